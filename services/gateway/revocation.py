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

    Raises:
        Unauthenticated: what `check` raises; the item that was waited for is given up.
    """
    loop = asyncio.get_running_loop()
    check_at = loop.time() + CHECK_SECONDS
    waiting: asyncio.Future[ItemT] | None = None
    try:
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(anext(source))
            await asyncio.wait({waiting}, timeout=max(0.0, check_at - loop.time()))
            if loop.time() >= check_at:
                await check()
                check_at = loop.time() + CHECK_SECONDS
            if waiting.done():
                done, waiting = waiting, None
                try:
                    item = done.result()
                except StopAsyncIteration:
                    return
                yield item
    finally:
        if waiting is not None:
            waiting.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await waiting
