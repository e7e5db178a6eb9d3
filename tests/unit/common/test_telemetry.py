"""Recorded trace contexts: written down, taken up again as a parent, and linked to."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.common import telemetry

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
RECORDED = f"00-{TRACE_ID}-{SPAN_ID}-01"
NO_CONTEXT = ["", "nonsense", f"00-{'0' * 32}-{SPAN_ID}-01", RECORDED.replace("b7", "zz")]


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Collect our spans, through no provider of the process."""
    collected = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(collected))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    return collected


def one(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


def test_outside_a_trace_there_is_nothing_to_write_down() -> None:
    assert telemetry.traceparent() == ""


def test_what_was_written_down_is_a_parent_later(exporter: InMemorySpanExporter) -> None:
    with telemetry.tracer().start_as_current_span("request") as request:
        written = telemetry.traceparent()
    with telemetry.child_of(written):
        telemetry.tracer().start_span("work").end()
    work = next(span for span in exporter.get_finished_spans() if span.name == "work")
    assert work.parent is not None
    assert work.parent.span_id == request.get_span_context().span_id
    assert telemetry.traceparent() == ""


@pytest.mark.parametrize("traceparent", NO_CONTEXT)
def test_what_names_no_span_changes_nothing(traceparent: str, exporter: InMemorySpanExporter) -> None:
    with telemetry.child_of(RECORDED), telemetry.child_of(traceparent):
        assert telemetry.traceparent() == RECORDED
    span = telemetry.tracer().start_span("load")
    telemetry.link(span, traceparent)
    span.end()
    assert one(exporter).links == ()


def test_a_link_names_the_recorded_span(exporter: InMemorySpanExporter) -> None:
    span = telemetry.tracer().start_span("load")
    telemetry.link(span, RECORDED)
    span.end()
    (link,) = one(exporter).links
    assert trace.format_trace_id(link.context.trace_id) == TRACE_ID
    assert trace.format_span_id(link.context.span_id) == SPAN_ID
    assert one(exporter).parent is None


def test_an_error_in_the_body_is_not_the_parents_to_report(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(KeyError), telemetry.child_of(RECORDED):
        raise KeyError("body")
    assert exporter.get_finished_spans() == ()
