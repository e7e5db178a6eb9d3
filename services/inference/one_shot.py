"""Requests that produce no tokens, such as scores: many at once, and of each only the last event."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from services.inference.driver import Driver
from services.inference.engine.events import TokenEvent
from services.inference.engine.request import Request
from services.inference.streams import stream_events

# More at once would take places in the queue from other callers and be no faster.
_AT_ONCE = 16


async def last_events(driver: Driver, requests: Sequence[Request]) -> list[TokenEvent]:
    """Run all requests, each of one sequence, and return the last event of each, in their order.

    Raises:
        LorafleetError: that of the first to fail; the others are ended.
    """
    places = asyncio.Semaphore(_AT_ONCE)
    tasks = [asyncio.create_task(_last_event(driver, request, places)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _last_event(driver: Driver, request: Request, places: asyncio.Semaphore) -> TokenEvent:
    async with places, aclosing(stream_events(driver, request)) as batches:
        events = [event async for batch in batches for event in batch]
    return events[-1]
