"""Deadlines: every call has one, the caller's or the server's maximum, whichever comes first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.common.call_context import call_scope
from services.common.errors import DeadlineExceeded
from services.common.rpc.call import Call, Layer


def deadline_layer(*, unary_seconds: float, stream_seconds: float) -> Layer:
    """Return the layer that ends a call by `DEADLINE_EXCEEDED` when its time is up.

    Args:
        unary_seconds: the longest that a call with one request and one response may take.
        stream_seconds: the longest that any other call may take.

    Health and reflection calls have no maximum: a health `Watch` lasts as long as its caller.
    """

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        if not call.is_ours:
            yield
            return
        maximum_seconds = stream_seconds if call.is_streaming else unary_seconds
        call.client_timeout_seconds = call.context.time_remaining()
        asked_seconds = call.client_timeout_seconds
        allowed_seconds = maximum_seconds if asked_seconds is None else min(maximum_seconds, asked_seconds)
        late = DeadlineExceeded(
            "deadline_exceeded",
            f"the call was not done after {allowed_seconds:.3f} s",
            limit=f"{maximum_seconds:g} s",
        )
        if allowed_seconds <= 0:
            raise late
        timeout = asyncio.timeout(allowed_seconds)
        try:
            with call_scope(timeout_seconds=allowed_seconds):
                async with timeout:
                    yield
        except TimeoutError:
            if timeout.expired():
                raise late from None
            raise

    return layer
