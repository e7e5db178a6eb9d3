"""A fine-tuning job as a fold over its records: what was asked, then everything that happened to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from services.common.errors import NotFound
from services.common.ids import is_id
from services.trainer.failure import JobFailure
from services.trainer.spec import TrainingSpec

JOB_PREFIX = "ftjob"
EVENT_PREFIX = "ftevent"
CHECKPOINT_PREFIX = "ftckpt"


class JobState(StrEnum):
    """Where a job stands; states only move forward, but for a job that is resumed and waits again.

    CANCELLING is never recorded: it is what RUNNING looks like once a cancel was asked for.
    """

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self in _FINAL


_FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
_NEXT: dict[JobState, frozenset[JobState]] = {
    JobState.VALIDATING_FILES: frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.FAILED, JobState.CANCELLED}),
    # Also to SUCCEEDED after a cancel was asked for: it came while the version was being published.
    JobState.RUNNING: _FINAL | {JobState.PAUSED},
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    # Where the cause can be taken away, see `Job.is_resumable`.
    JobState.FAILED: frozenset({JobState.QUEUED}),
}
# Failures that say something about the machine and nothing about the job.
_RESUMABLE = frozenset({"storage_full", "out_of_memory", "worker_crashed"})


class Level(StrEnum):
    """How much an event matters."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Progress:
    """The figures of the last optimizer step."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    eta_seconds: float
    peak_memory_bytes: int
    epoch: float


@dataclass(frozen=True, slots=True)
class EvaluationMetric:
    """One figure on the held-out rows, of the base and of the adapter.

    `ci_low` to `ci_high` is the adapter's 95 % interval; `lift_ci_low` to `lift_ci_high` that of the
    adapter's value minus the base's, drawn in pairs.
    """

    name: str
    base_value: float
    adapter_value: float
    rows: int
    ci_low: float | None = None
    ci_high: float | None = None
    lift_ci_low: float | None = None
    lift_ci_high: float | None = None


@dataclass(frozen=True, slots=True)
class HistogramBucket:
    """Rows of which at most so many tokens, and more than the bucket before, count in the loss."""

    up_to_tokens: int
    rows: int


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """What the data looks like; see `trainer/v1/job.proto`."""

    rows: int
    validation_rows: int
    schema: str
    tokens: int
    supervised_tokens: int
    max_row_tokens: int
    overlong_rows: int
    duplicate_rows: int
    overlap_rows: int
    digest: str
    truncated_rows: int = 0
    dropped_rows: int = 0
    validation_digest: str = ""
    supervised_histogram: tuple[HistogramBucket, ...] = ()
    rows_without_stop: int = 0
    prefix_mismatch_rows: int = 0
    last_turn_only_rows: int = 0

    @property
    def warnings(self) -> dict[str, tuple[int, str]]:
        """What the owner of the data should know: by the name of the figure, the figure and words for it."""
        words = {
            "duplicate_rows": "rows repeat an earlier row",
            "overlap_rows": "validation rows are also trained on; figures will look too good",
            "truncated_rows": "rows were too long and are cut",
            "dropped_rows": "rows were too long and are left out",
            "rows_without_stop": "rows do not end with a token that ends generation; the model may not stop",
            "prefix_mismatch_rows": "rows do not begin with what serving sends for their last answer",
            "last_turn_only_rows": "rows teach their last answer only: the template rewrites earlier ones",
        }
        counted = {name: (int(getattr(self, name)), text) for name, text in words.items()}
        return {name: warning for name, warning in counted.items() if warning[0]}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run is expected to take; see `trainer/v1/job.proto`."""

    tokens: int
    steps: int
    minutes: float
    memory_bytes: dict[str, int]
    limit_bytes: int = 0
    minutes_basis: str = "assumed"

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.memory_bytes.values())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A point that the job can resume from; `manifest_digest` seals the objects stored under its id."""

    id: str
    step: int
    create_time: datetime
    train_loss: float
    manifest_digest: str
    trained_tokens: int
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    fine_tuned_model: str = ""


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a finished job made."""

    adapter: str
    version: int
    digest: str
    fine_tuned_model: str


@dataclass(frozen=True, slots=True)
class ParityReport:
    """How far two services are apart on the probes, in nats; see `trainer/v1/job.proto`."""

    rows: int
    tokens: int
    max_difference: float
    mean_difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the version may be published. What is not a number does not hold."""
        return self.max_difference <= self.tolerance


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """What was measured of a checkpoint before it was published; see `trainer/v1/job.proto`."""

    conversion_error: float
    evaluation: tuple[EvaluationMetric, ...] = ()
    collapsed: bool | None = None
    parity: ParityReport | None = None


@dataclass(frozen=True, slots=True)
class Publication:
    """A checkpoint on its way to become a version of an adapter.

    Attributes:
        fine_tuned_model: the version's name; empty where it was measured only, or refused.
        report: what was measured; None for versions older than the measuring.
    """

    checkpoint_id: str
    adapter: str
    fine_tuned_model: str
    time: datetime
    report: CheckpointReport | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a record adds to the job; None leaves it as it was."""

    claimed: bool | None = None
    released: bool | None = None
    crashed: bool | None = None
    dataset: DatasetReport | None = None
    estimate: Estimate | None = None
    checkpoint: Checkpoint | None = None
    evaluation: tuple[EvaluationMetric, ...] | None = None
    parity: ParityReport | None = None
    collapsed: bool | None = None
    conversion_error: float | None = None
    result_file: str | None = None
    result: JobResult | None = None
    failure: JobFailure | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """A record before it has a place in the job's history."""

    message: str
    level: Level = Level.INFO
    state: JobState | None = None
    metrics: Progress | None = None
    data: dict[str, float] = field(default_factory=dict)
    facts: Facts | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One thing that happened to a job. Watchers see it as an event.

    Attributes:
        sequence: 1, 2, 3 ... within the job.
        token: the fencing token of the lease that wrote it.
    """

    sequence: int
    token: int
    time: datetime
    draft: Draft


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What was asked for, with every default filled in. Never changes.

    Attributes:
        traceparent: W3C trace context of the call that created it; empty where that was not traced.
    """

    id: str
    tenant: str
    base_model: str
    training_file: str
    validation_file: str
    adapter: str
    spec: TrainingSpec
    seed: int
    metadata: dict[str, str]
    create_time: datetime
    idempotency_key: str = ""
    request_digest: str = ""
    traceparent: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """The ids of its files: training, and validation where there is one."""
        return tuple(filter(None, (self.training_file, self.validation_file)))


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it stands after all of its records."""

    request: JobRequest
    state: JobState = JobState.VALIDATING_FILES
    last_sequence: int = 0
    last_token: int = 0
    start_time: datetime | None = None
    end_time: datetime | None = None
    failure: JobFailure | None = None
    progress: Progress | None = None
    dataset: DatasetReport | None = None
    estimate: Estimate | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    evaluation: tuple[EvaluationMetric, ...] | None = None
    parity: ParityReport | None = None
    collapsed: bool | None = None
    """Whether the adapter gives one answer to different prompts; None where that was not looked at."""
    conversion_error: float | None = None
    result_file: str | None = None
    result: JobResult | None = None
    trained_tokens: int = 0
    attempts: int = 0
    is_claimed: bool = False
    paused_at: int = 0
    """Number of the last record that paused the job."""
    crashes: int = 0
    """Attempts since the last checkpoint that ended without a word."""

    @property
    def id(self) -> str:
        """The job's id."""
        return self.request.id

    def checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """Return one of the job's checkpoints; raise `NotFound` (`checkpoint_not_found`) for others."""
        for checkpoint in self.checkpoints:
            if checkpoint.id == checkpoint_id:
                return checkpoint
        raise NotFound(
            "checkpoint_not_found",
            f"job {self.id} has no such checkpoint",
            field="checkpoint_id",
            value=checkpoint_id,
        )

    @property
    def is_resumable(self) -> bool:
        """Whether the job can wait again: it is paused, or failed for want of room or memory."""
        if self.state is JobState.FAILED and self.failure is not None:
            return self.failure.reason in _RESUMABLE
        return self.state is JobState.PAUSED

    def apply(self, record: Record) -> Job:
        """Return the job after `record`, which must be the next one."""
        assert record.sequence == self.last_sequence + 1, "records are applied in order"
        draft = record.draft
        job = replace(self, last_sequence=record.sequence, last_token=record.token)
        if draft.state is not None and draft.state is not self.state:
            assert draft.state in _NEXT.get(self.state, ()), f"no way from {self.state} to {draft.state}"
            job = replace(job, state=draft.state)
            if self.state is JobState.FAILED:
                job = replace(job, failure=None, end_time=None, crashes=0)
            if draft.state is JobState.RUNNING:
                job = replace(job, start_time=self.start_time or record.time)
            if draft.state is JobState.PAUSED:
                job = replace(job, is_claimed=False, paused_at=record.sequence)
            if draft.state.is_final:
                job = replace(job, end_time=record.time, is_claimed=False)
        if draft.metrics is not None:
            job = replace(job, progress=draft.metrics)
        return job if draft.facts is None else job.with_facts(draft.facts)

    def with_facts(self, facts: Facts) -> Job:
        """Return the job with what a record adds to it."""
        job = self
        if facts.claimed:
            # The last attempt left no word of its end: its worker died with it.
            crashes = self.crashes + 1 if self.is_claimed else self.crashes
            job = replace(job, attempts=self.attempts + 1, is_claimed=True, crashes=crashes)
        if facts.released:
            job = replace(job, is_claimed=False)
        if facts.crashed:
            job = replace(job, is_claimed=False, crashes=self.crashes + 1)
        if facts.checkpoint is not None:
            job = replace(
                job,
                checkpoints=(*self.checkpoints, facts.checkpoint),
                trained_tokens=facts.checkpoint.trained_tokens,
                crashes=0,
            )
        if facts.result is not None and job.checkpoints:
            last = replace(job.checkpoints[-1], fine_tuned_model=facts.result.fine_tuned_model)
            job = replace(job, checkpoints=(*job.checkpoints[:-1], last))
        plain = {
            name: value
            for name in (
                "dataset",
                "estimate",
                "evaluation",
                "collapsed",
                "conversion_error",
                "parity",
                "result_file",
                "result",
                "failure",
            )
            if (value := getattr(facts, name)) is not None
        }
        return replace(job, **plain)


def fold(request: JobRequest, records: Iterable[Record]) -> Job:
    """Return the job that `request` and its records make."""
    job = Job(request)
    for record in records:
        job = job.apply(record)
    return job


def event_id(job_id: str, sequence: int) -> str:
    """Return the public id of a record: `ftevent-`, the job's own part, and the record's number."""
    return f"{EVENT_PREFIX}-{job_id.partition('-')[2]}-{sequence}"


def event_sequence(job_id: str, text: str) -> int:
    """Return the number in an event id of `job_id`; raise `NotFound` (`event_not_found`) for others."""
    head, _, number = text.rpartition("-")
    is_number = number.isascii() and number.isdigit() and 0 < len(number) <= 9
    if not is_number or head != f"{EVENT_PREFIX}-{job_id.partition('-')[2]}":
        raise NotFound("event_not_found", f"job {job_id} has no such event", field="event_id", value=text)
    return int(number)


def check_job_id(text: str) -> str:
    """Return `text` if it has the form of a job id; raise `NotFound` (`job_not_found`) otherwise."""
    if not is_id(JOB_PREFIX, text):
        raise job_not_found(text)
    return text


def job_not_found(job_id: str) -> NotFound:
    """Return the error for a job that does not exist for this tenant."""
    return NotFound("job_not_found", "there is no such job", field="job_id", value=job_id)
