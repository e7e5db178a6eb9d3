"""The end of calls that else have none: health watches and reflection streams, when the server drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.common.errors import Unavailable
from services.common.rpc.call import Call

NOTICE_SECONDS = 0.2
"""Time for a health watch to hear NOT_SERVING before it is ended."""


class DrainLayer:
    """Ends foreign streams on `begin`, so that a watcher does not hold the server for its whole grace."""

    def __init__(self) -> None:
        self._open: set[asyncio.Timeout] = set()

    def begin(self) -> None:
        """End the streams of health and reflection by UNAVAILABLE, after a short notice."""
        end_at = asyncio.get_running_loop().time() + NOTICE_SECONDS
        for timeout in self._open:
            timeout.reschedule(end_at)

    @asynccontextmanager
    async def layer(self, call: Call) -> AsyncIterator[None]:
        """Keep track of a foreign stream while it lasts; calls of ours pass untouched."""
        if call.is_ours or not call.is_streaming:
            yield
            return
        timeout = asyncio.timeout(None)
        try:
            async with timeout:
                self._open.add(timeout)
                try:
                    yield
                finally:
                    self._open.discard(timeout)
        except TimeoutError:
            if timeout.expired():
                raise Unavailable("draining", "this server is shutting down") from None
            raise
