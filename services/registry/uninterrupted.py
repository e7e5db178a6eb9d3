"""Work that goes on to its end although its caller was cancelled: threads cannot be stopped half way."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def to_the_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Return what `work` returns. A cancellation is passed on only once `work` has ended."""
    return await _ended(asyncio.create_task(work))


async def in_thread(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """As `asyncio.to_thread`, but never leaves the call running behind its caller's back."""
    return await _in_executor(None, functools.partial(call, *args, **kwargs))


class Threads:
    """Threads of its own for one kind of work, so that it can be slow without keeping other work waiting."""

    def __init__(self, most: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=most, thread_name_prefix=name)

    async def run(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """As `in_thread`, in one of these threads."""
        return await _in_executor(self._executor, functools.partial(call, *args, **kwargs))

    def close(self) -> None:
        """Take no more work; what is under way ends by itself."""
        self._executor.shutdown(wait=False)


async def _in_executor(executor: Executor | None, call: Callable[[], _T]) -> _T:
    context = contextvars.copy_context()
    return await _ended(asyncio.get_running_loop().run_in_executor(executor, context.run, call))


async def _ended(future: asyncio.Future[_T]) -> _T:
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            # Nobody is left to tell; asking keeps asyncio from reporting it as forgotten.
            future.exception()
        raise
