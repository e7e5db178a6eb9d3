"""The server span of a call, a child of the caller's span where it sent a W3C trace context."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from opentelemetry.trace import SpanKind

from services.common import telemetry
from services.common.rpc.call import Call


@asynccontextmanager
async def tracing_layer(call: Call) -> AsyncIterator[None]:
    """Run the call inside a server span; health and reflection calls make none."""
    if not call.is_ours:
        yield
        return
    with telemetry.tracer().start_as_current_span(
        call.method.lstrip("/"),
        context=telemetry.incoming_context(call.metadata),
        kind=SpanKind.SERVER,
        attributes=telemetry.rpc_attributes(call.method),
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield
        finally:
            telemetry.record_status(span, call.code, server=True)
            if call.reason is not None:
                span.set_attribute("error.type", call.reason)
