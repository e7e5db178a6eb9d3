"""What every server measures: how long calls took and how they ended, and how many are under way."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.common import metrics
from services.common.rpc.call import Call

_duration = metrics.histogram("rpc.server.call.duration")
_in_flight = metrics.up_down_counter("lorafleet.rpc.server.calls_in_flight")
_without_deadline = metrics.counter("lorafleet.rpc.server.calls_without_deadline")


@asynccontextmanager
async def metering_layer(call: Call) -> AsyncIterator[None]:
    """Measure a call of ours; health and reflection are not counted.

    The attributes take few values: methods and reasons are words in our source, never a caller's.
    """
    if not call.is_ours:
        yield
        return
    method = {"rpc.method": call.method.lstrip("/")}
    started = time.monotonic()
    _in_flight.add(1, method)
    if call.context.time_remaining() is None:
        _without_deadline.add(1, method)
    try:
        yield
    finally:
        _in_flight.add(-1, method)
        outcome = {"rpc.response.status_code": call.code.name}
        if call.reason is not None:
            outcome["error.type"] = call.reason
        _duration.record(time.monotonic() - started, method | outcome)
