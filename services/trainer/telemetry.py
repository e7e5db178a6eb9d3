"""The figures of the jobs in work as metrics; a job's series end with its run, so their number is bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opentelemetry.metrics import CallbackOptions, Observation

from services.common import metrics
from services.trainer.job import Job, JobState, Progress

_ended = metrics.counter("lorafleet.trainer.jobs.ended")


class JobMeasures:
    """The last step of every job that this process has in work."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[dict[str, str], Progress]] = {}
        metrics.observable_gauge("lorafleet.trainer.job.step", callbacks=[self._of("step")])
        metrics.observable_gauge("lorafleet.trainer.job.total_steps", callbacks=[self._of("total_steps")])
        metrics.observable_gauge("lorafleet.trainer.job.loss", callbacks=[self._of("loss")])
        metrics.observable_gauge("lorafleet.trainer.job.learning_rate", callbacks=[self._of("learning_rate")])
        metrics.observable_gauge("lorafleet.trainer.job.gradient_norm", callbacks=[self._of("gradient_norm")])
        metrics.observable_gauge(
            "lorafleet.trainer.job.throughput", callbacks=[self._of("tokens_per_second")]
        )
        metrics.observable_gauge("lorafleet.trainer.job.eta", callbacks=[self._of("eta_seconds")])
        metrics.observable_gauge(
            "lorafleet.trainer.job.memory.peak", callbacks=[self._of("peak_memory_bytes")]
        )

    def note(self, job: Job, progress: Progress) -> None:
        """Take the figures of a step."""
        attributes = {"job": job.id, "base": job.request.base_model, "adapter": job.request.adapter}
        self._steps[job.id] = (attributes, progress)

    def forget(self, job_id: str) -> None:
        """Show nothing more of a job, whose run has ended."""
        self._steps.pop(job_id, None)

    def ended(self, job: Job) -> None:
        """Count a job whose run has ended, by where it stands."""
        state = job.state if job.state.is_final or job.state is JobState.PAUSED else JobState.QUEUED
        reason = {} if job.failure is None else {"error.type": job.failure.reason}
        _ended.add(1, {"state": state.value, **reason})

    def _of(self, field: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            # A copy: the collector reads from a thread of its own.
            for attributes, progress in list(self._steps.values()):
                yield Observation(getattr(progress, field), attributes)

        return observe
