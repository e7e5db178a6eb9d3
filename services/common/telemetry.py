"""OpenTelemetry traces: W3C trace context in gRPC metadata, spans exported by OTLP where an endpoint is set.

The instrumentation package for gRPC is not used: its server side breaks coroutine methods that answer by
`context.write` (the stock health `Watch`), and its client side replaces a stream's call by a generator, which
loses `cancel()`. The server layer is in `services.common.rpc.tracing`, the client side in
`services.common.channels`.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, Status, StatusCode

_INSTRUMENTATION = "lorafleet"


class Telemetry:
    """Owns the tracer provider of a process; `shutdown` sends what is left."""

    def __init__(self, service: str, endpoint: str | None) -> None:
        """Start exporting to `endpoint` (`http://host:4317`), or do nothing where it is None."""
        self._provider: TracerProvider | None = None
        if endpoint is not None:
            resource = Resource.create({"service.name": f"lorafleet-{service}"})
            self._provider = TracerProvider(resource=resource)
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
            trace.set_tracer_provider(self._provider)

    def shutdown(self) -> None:
        """Export the spans still held and stop; blocks for some seconds if the collector does not answer."""
        if self._provider is not None:
            self._provider.shutdown()


def tracer() -> trace.Tracer:
    """Return the tracer for our own spans."""
    return trace.get_tracer(_INSTRUMENTATION)


def rpc_attributes(method: str) -> dict[str, str]:
    """Return the span attributes of the semantic conventions for a method such as `/pkg.Service/Method`."""
    service, _, name = method.lstrip("/").rpartition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}


def incoming_context(metadata: Iterable[tuple[str, str | bytes]]) -> Context:
    """Return the trace context that a caller sent; an empty one where it sent none."""
    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    return propagate.extract(carrier, context=Context())


def outgoing_metadata() -> list[tuple[str, str]]:
    """Return the metadata that carries the present trace context on."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return list(carrier.items())


def record_status(span: Span, code: grpc.StatusCode, *, server: bool) -> None:
    """Write a call's end on its span. A caller's mistake is an error of the client span only."""
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if code in (_SERVER_FAULTS if server else _CLIENT_FAULTS):
        span.set_status(Status(StatusCode.ERROR, code.name))


_CLIENT_FAULTS = frozenset(grpc.StatusCode) - {grpc.StatusCode.OK}
_SERVER_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
