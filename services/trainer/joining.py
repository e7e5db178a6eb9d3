"""Which jobs train together with a given one."""

from __future__ import annotations

from services.trainer.job import Job, JobState
from services.trainer.methods import can_join

_SHARED = ("base", "runtime")


class Joining:
    """Gathers jobs on the base of a first one for as long as all of them fit into memory together."""

    def __init__(self, first: Job) -> None:
        self._first = first
        self._own_bytes: dict[str, int] = {first.id: _own_bytes(first)}

    @property
    def is_open(self) -> bool:
        """Whether the first job can train together with others at all."""
        return _may_join(self._first)

    def suits(self, job: Job) -> bool:
        """Return whether `job` may join, and count it in if so; asking again about it changes nothing."""
        first = self._first.request
        if (
            not _may_join(job)
            or job.state is not JobState.QUEUED
            or job.request.base_model != first.base_model
        ):
            return False
        estimate = self._first.estimate
        if estimate is not None and estimate.limit_bytes:
            others = sum(size for job_id, size in self._own_bytes.items() if job_id != job.id)
            shared = sum(estimate.memory_bytes.get(part, 0) for part in _SHARED)
            if shared + others + _own_bytes(job) > estimate.limit_bytes:
                return False
        self._own_bytes[job.id] = _own_bytes(job)
        return True


def _may_join(job: Job) -> bool:
    # What crashed may crash again, and shall take nobody along.
    return can_join(job.request.spec) and job.crashes == 0


def _own_bytes(job: Job) -> int:
    """Return what a job needs beside what jobs of one process share, as far as it was estimated."""
    if job.estimate is None:
        return 0
    return sum(size for part, size in job.estimate.memory_bytes.items() if part not in _SHARED)
