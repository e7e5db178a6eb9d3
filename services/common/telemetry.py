"""OpenTelemetry traces and metrics of a process, and the W3C trace context in gRPC metadata.

Both are exported by OTLP where an endpoint is set; metrics can be had from a Prometheus port as well.

The instrumentation package for gRPC is not used: its server side breaks coroutine methods that answer by
`context.write` (the stock health `Watch`), and its client side replaces a stream's call by a generator, which
loses `cancel()`. The server layer is in `services.common.rpc.tracing`, the client side in
`services.common.channels`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from wsgiref.simple_server import WSGIServer

import grpc
from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, Status, StatusCode
from prometheus_client import start_http_server

from services.common.config import Address

_INSTRUMENTATION = "lorafleet"
_TRACEPARENT = "traceparent"


class Telemetry:
    """Owns the tracer and meter providers of a process; `shutdown` sends what is left."""

    def __init__(self, service: str, endpoint: str | None, metrics_address: Address | None = None) -> None:
        """Start exporting.

        Args:
            service: name of the service, e.g. `registry`.
            endpoint: OTLP collector (`http://host:4317`) for traces and metrics, if there is one.
            metrics_address: where to answer Prometheus; port 0 takes a free one; no port is opened when None.

        Raises:
            OSError: `metrics_address` cannot be bound.
        """
        self.metrics_address: Address | None = None
        """Where Prometheus is answered, with the port that was bound."""
        self._tracers: TracerProvider | None = None
        self._meters: MeterProvider | None = None
        self._prometheus: WSGIServer | None = None
        resource = Resource.create({"service.name": f"lorafleet-{service}"})
        readers: list[MetricReader] = []
        if metrics_address is not None:
            self._prometheus, _ = start_http_server(metrics_address.port, metrics_address.host)
            self.metrics_address = Address(metrics_address.host, self._prometheus.server_port)
            readers.append(PrometheusMetricReader())
        if endpoint is not None:
            self._tracers = TracerProvider(resource=resource)
            self._tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
            trace.set_tracer_provider(self._tracers)
            readers.append(PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=endpoint)))
        if readers:
            self._meters = MeterProvider(readers, resource=resource)
            metrics.set_meter_provider(self._meters)

    def shutdown(self) -> None:
        """Export what is still held and stop; blocks for some seconds if the collector does not answer."""
        if self._prometheus is not None:
            self._prometheus.shutdown()
            self._prometheus.server_close()
        for provider in (self._tracers, self._meters):
            if provider is not None:
                provider.shutdown()


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


def traceparent() -> str:
    """Return the present span as a W3C `traceparent`, for a record that outlives it; empty without one."""
    return dict(outgoing_metadata()).get(_TRACEPARENT, "")


def context_of(traceparent: str) -> Context:
    """Return the trace context of a recorded `traceparent`; an empty one where it names no span."""
    return propagate.extract({_TRACEPARENT: traceparent}, context=Context())


@contextmanager
def child_of(traceparent: str) -> Iterator[None]:
    """Make the recorded span the parent of what the body does; nothing changes where it names no span."""
    recorded = trace.get_current_span(context_of(traceparent))
    if not recorded.get_span_context().is_valid:
        yield
        return
    with trace.use_span(recorded, end_on_exit=False, record_exception=False, set_status_on_exception=False):
        yield


def link(span: Span, traceparent: str) -> None:
    """Link `span` to a recorded span that led to it; nothing happens where `traceparent` names none."""
    recorded = trace.get_current_span(context_of(traceparent)).get_span_context()
    if recorded.is_valid:
        span.add_link(recorded)


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
