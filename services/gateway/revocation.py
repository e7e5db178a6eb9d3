"""Streams end when the key that opened them is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from services.common.errors import Unauthenticated, Unavailable
from services.gateway.keys import KeyRing

CHECK_SECONDS = 2.0

ItemT = TypeVar("ItemT")
Check = Callable[[], Awaitable[None]]


def key_check(keys: KeyRing, key: str | None) -> Check:
    """Return what raises `Unauthenticated` (`key_revoked`) once `key` is no longer good.

    While nobody can tell, because the store does not answer, the stream goes on.
    """

    async def check() -> None:
        try:
            with suppress(Unavailable):
                await keys.authenticate(key)
        except Unauthenticated as error:
            raise Unauthenticated("key_revoked", "the API key was revoked or has expired") from error

    return check


async def guarded(source: AsyncIterator[ItemT], check: Check) -> AsyncGenerator[ItemT]:
    """Yield the items of `source`, asking `check` every `CHECK_SECONDS`, whether items come or not.

    The asking is a task of its own, which interrupts the wait for an item: a task for each item instead would
    cost more than all else that is done with it.

    Raises:
        Unauthenticated: what `check` raises; the item that was waited for is given up.
    """
    waiting: asyncio.Task[object] | None = None
    is_interrupted = False

    def interrupt(_: asyncio.Task[None]) -> None:
        nonlocal is_interrupted
        if waiting is not None:
            is_interrupted = waiting.cancel()

    checking = asyncio.create_task(_keep_asking(check))
    checking.add_done_callback(interrupt)
    try:
        while True:
            _raise_what_ended(checking)
            waiting = asyncio.current_task()
            assert waiting is not None, "generators are iterated by tasks"
            try:
                item = await anext(source)
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                # It may be ours, or come from whoever wants this stream to end, or both.
                if is_interrupted and not waiting.uncancel():
                    checking.result()
                raise
            finally:
                waiting = None
            yield item
    finally:
        checking.cancel()


async def _keep_asking(check: Check) -> None:
    """Ask for ever; end only by what `check` raises."""
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        await check()


def _raise_what_ended(checking: asyncio.Task[None]) -> None:
    if checking.done():
        checking.result()
