"""The span of one attempt at a job: from its start in a process to its end, or until it is handed back."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from services.common import telemetry
from services.trainer.job import Draft, Job

_EVENT = "lorafleet.job.record"


class JobRun:
    """A job in work, and its span: a child of the call that created the job, so that both are one trace.

    The worker keeps the span, because it outlives a process that is killed. What the process asks of other
    services, the publication of the version among it, has this span for its parent.
    """

    def __init__(self, job: Job) -> None:
        """Begin the span."""
        self.job = job
        request = job.request
        self._span = telemetry.tracer().start_span(
            f"fine_tune {request.base_model}",
            context=telemetry.context_of(request.traceparent),
            attributes={
                "gen_ai.operation.name": "fine_tune",
                "gen_ai.provider.name": "lorafleet",
                "gen_ai.request.model": request.base_model,
                "lorafleet.job.id": job.id,
                "lorafleet.job.attempt": job.attempts,
                "lorafleet.adapter": request.adapter,
            },
        )
        with trace.use_span(self._span, end_on_exit=False):
            self.traceparent = telemetry.traceparent()

    def recorded(self, draft: Draft) -> None:
        """Note what was recorded of the job, but for its steps, which the metrics show."""
        if draft.metrics is None:
            self._span.add_event(_EVENT, {"lorafleet.job.message": draft.message})

    def ended(self, job: Job) -> None:
        """End the span with what became of the job; a second time does nothing."""
        if not self._span.is_recording():
            return
        self._span.set_attribute("lorafleet.job.state", job.state.value)
        if job.result is not None:
            self._span.set_attribute("lorafleet.version.digest", job.result.digest)
        if job.failure is not None:
            self._span.set_attribute("error.type", job.failure.reason)
            self._span.set_status(Status(StatusCode.ERROR, job.failure.reason))
        self._span.end()
