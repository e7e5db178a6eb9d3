"""Reading what a client still sends when its call has already been answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

# Enough for what a client has under way; one that sends on for longer loses the details of the answer.
LIMIT_SECONDS = 5.0
LIMIT_MESSAGES = 1024


@asynccontextmanager
async def read_to_the_end(requests: AsyncIterator[Any]) -> AsyncIterator[None]:
    """Read the rest of `requests` once the body has ended or failed.

    A server that answers early ends the stream under the client's hands. Python's client then reports its own
    failed write as INTERNAL, in place of the answer.
    """
    try:
        yield
    except Exception:
        await _read_rest(requests)
        raise
    await _read_rest(requests)


async def _read_rest(requests: AsyncIterator[Any]) -> None:
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            count = 0
            async for _ in requests:
                count += 1
                if count == LIMIT_MESSAGES:
                    return
    except TimeoutError:
        return
