"""The span of a job's run: where it belongs, what it tells, how it ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from services.common import telemetry
from services.common.errors import ResourceExhausted
from services.trainer.failure import JobFailure
from services.trainer.job import Draft, Job, JobResult, JobState, Progress
from services.trainer.job_run import JobRun
from tests.support.job_desk import request

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CREATED_BY = f"00-{TRACE_ID}-b7ad6b7169203331-01"
STEP = Progress(
    step=1,
    total_steps=2,
    loss=1.0,
    learning_rate=0.1,
    gradient_norm=1.0,
    tokens_per_second=1.0,
    eta_seconds=1.0,
    peak_memory_bytes=1,
    epoch=0.5,
)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    collected = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(collected))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    return collected


def running(traceparent: str = CREATED_BY) -> Job:
    asked = replace(request(), traceparent=traceparent)
    return Job(asked, state=JobState.RUNNING, attempts=2)


def one(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


def test_a_run_is_a_child_of_the_call_that_created_the_job(exporter: InMemorySpanExporter) -> None:
    job = running()
    run = JobRun(job)
    run.recorded(Draft("Evaluation done"))
    run.recorded(Draft("Step 1/2", metrics=STEP))
    result = JobResult("billing", 3, "sha256:" + "0" * 64, "ft:tiny:acme:billing:v3")
    run.ended(replace(job, state=JobState.SUCCEEDED, result=result))
    run.ended(replace(job, state=JobState.FAILED))
    span = one(exporter)
    assert span.name == "fine_tune tiny"
    assert span.parent is not None
    assert trace.format_trace_id(span.parent.trace_id) == TRACE_ID
    assert trace.format_span_id(span.context.span_id) == run.traceparent.split("-")[2]
    attributes = dict(span.attributes or {})
    assert attributes["lorafleet.job.id"] == job.id
    assert attributes["lorafleet.job.attempt"] == 2
    assert attributes["lorafleet.job.state"] == "succeeded"
    assert attributes["lorafleet.version.digest"] == result.digest
    # Steps are in the metrics.
    assert [dict(event.attributes or {}) for event in span.events] == [
        {"lorafleet.job.message": "Evaluation done"}
    ]
    assert span.status.status_code is StatusCode.UNSET


def test_a_job_that_nobody_traced_has_a_trace_of_its_own(exporter: InMemorySpanExporter) -> None:
    job = running("")
    JobRun(job).ended(job)
    assert one(exporter).parent is None


def test_a_failure_is_an_error_by_its_reason(exporter: InMemorySpanExporter) -> None:
    job = running()
    failure = JobFailure.of(ResourceExhausted("out_of_memory", "too large", final=True))
    JobRun(job).ended(replace(job, state=JobState.FAILED, failure=failure))
    span = one(exporter)
    assert dict(span.attributes or {})["error.type"] == "out_of_memory"
    assert span.status.status_code is StatusCode.ERROR
