"""From the driver's thread to one call on the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from services.inference.driver import Driver
from services.inference.engine.events import TokenEvent
from services.inference.engine.request import Request


async def stream_events(driver: Driver, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
    """Submit a request and yield its events as they come; what came while the reader was slow comes at once.

    Ends when every sequence has ended. However it is left, the engine then works on the request no more.

    Raises:
        LorafleetError: the request was refused, or one of its sequences failed.
    """
    mailbox = _Mailbox(asyncio.get_running_loop())
    unfinished = request.sampling.n
    try:
        driver.submit(request, mailbox.put)
        while unfinished:
            events = await mailbox.take()
            for event in events:
                if event.error is not None:
                    raise event.error
                unfinished -= event.finish_reason is not None
            yield events
    finally:
        driver.abort(request.id)


class _Mailbox:
    """Events in order: put by the driver's thread, taken by one task. Holds at most one answer's tokens."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[TokenEvent] = deque()
        self._filled = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        """Add an event; called on any thread."""
        self._events.append(event)
        self._loop.call_soon_threadsafe(self._filled.set)

    async def take(self) -> list[TokenEvent]:
        """Wait for at least one event and return all there are."""
        while not self._events:
            self._filled.clear()
            await self._filled.wait()
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events
