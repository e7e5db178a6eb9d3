"""Work that goes on to its end although its caller was cancelled: threads cannot be stopped half way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def to_the_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Return what `work` returns. A cancellation is passed on only once `work` has ended."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            # Nobody is left to tell; asking keeps asyncio from reporting it as forgotten.
            task.exception()
        raise


async def in_thread(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """As `asyncio.to_thread`, but never leaves the call running behind its caller's back."""
    return await to_the_end(asyncio.to_thread(call, *args, **kwargs))
