"""Between the contract's messages and the trainer's own types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from services.common.errors import FieldViolation, InvalidArgument
from services.common.status import to_status
from services.trainer.index import JobView
from services.trainer.job import (
    Checkpoint,
    CheckpointReport,
    DatasetReport,
    Estimate,
    EvaluationMetric,
    Job,
    JobState,
    Level,
    ParityReport,
    Progress,
    Record,
    event_id,
)
from services.trainer.methods import MethodCapability
from services.trainer.spec import LossScope, OverlongPolicy, Schedule, TaskMetric, TrainingSpec

STATES = {
    JobState.VALIDATING_FILES: job_pb2.JOB_STATE_VALIDATING_FILES,
    JobState.QUEUED: job_pb2.JOB_STATE_QUEUED,
    JobState.RUNNING: job_pb2.JOB_STATE_RUNNING,
    JobState.PAUSED: job_pb2.JOB_STATE_PAUSED,
    JobState.CANCELLING: job_pb2.JOB_STATE_CANCELLING,
    JobState.SUCCEEDED: job_pb2.JOB_STATE_SUCCEEDED,
    JobState.FAILED: job_pb2.JOB_STATE_FAILED,
    JobState.CANCELLED: job_pb2.JOB_STATE_CANCELLED,
}
_LEVELS = {
    Level.INFO: job_pb2.EVENT_LEVEL_INFO,
    Level.WARN: job_pb2.EVENT_LEVEL_WARN,
    Level.ERROR: job_pb2.EVENT_LEVEL_ERROR,
}
_OVERLONG = {
    OverlongPolicy.REJECT: job_pb2.OVERLONG_POLICY_REJECT,
    OverlongPolicy.TRUNCATE: job_pb2.OVERLONG_POLICY_TRUNCATE,
    OverlongPolicy.DROP: job_pb2.OVERLONG_POLICY_DROP,
}
_SCOPES = {
    LossScope.COMPLETIONS: job_pb2.LOSS_SCOPE_COMPLETIONS,
    LossScope.ALL: job_pb2.LOSS_SCOPE_ALL,
}
_SCHEDULES = {
    Schedule.COSINE: job_pb2.SCHEDULE_COSINE,
    Schedule.LINEAR: job_pb2.SCHEDULE_LINEAR,
    Schedule.CONSTANT: job_pb2.SCHEDULE_CONSTANT,
}
_METRICS = {
    TaskMetric.NONE: job_pb2.TASK_METRIC_UNSPECIFIED,
    TaskMetric.EXACT_MATCH: job_pb2.TASK_METRIC_EXACT_MATCH,
    TaskMetric.ROUGE_L: job_pb2.TASK_METRIC_ROUGE_L,
    TaskMetric.TOKEN_F1: job_pb2.TASK_METRIC_TOKEN_F1,
    TaskMetric.PEARSON: job_pb2.TASK_METRIC_PEARSON,
    TaskMetric.NUMERIC: job_pb2.TASK_METRIC_NUMERIC,
    TaskMetric.ACCURACY: job_pb2.TASK_METRIC_ACCURACY,
    TaskMetric.CHOICE_LETTER: job_pb2.TASK_METRIC_CHOICE_LETTER,
    TaskMetric.SQL_MATCH: job_pb2.TASK_METRIC_SQL_MATCH,
    TaskMetric.ENTITY_F1: job_pb2.TASK_METRIC_ENTITY_F1,
}
_ENUMS: dict[str, dict[int, object]] = {
    "overlong_policy": {number: name for name, number in _OVERLONG.items()},
    "loss_scope": {number: name for name, number in _SCOPES.items()},
    "schedule": {number: name for name, number in _SCHEDULES.items()},
    "task_metric": {number: name for name, number in _METRICS.items()},
}
_PLAIN = (
    "gradient_checkpointing",
    "rank",
    "alpha",
    "dropout",
    "learning_rate",
    "n_epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "max_seq_len",
    "validation_fraction",
    "checkpoint_steps",
    "evaluation_rows",
    "recipe",
    "optimizer",
    "packing",
    "group_by_length",
    "lora_plus_ratio",
    "early_stopping_patience",
    "token_budget",
    "minutes_budget",
    "joint",
    "strict",
)


def given_spec(message: job_pb2.TrainingSpec) -> dict[str, object]:
    """Return the fields that the caller set, by the names of `TrainingSpec`; ranges are checked elsewhere.

    Raises:
        InvalidArgument: `bad_hyperparameter`, for an enum value that this version does not know.
    """
    given: dict[str, object] = {
        field.name: value for field, value in message.ListFields() if field.name in _PLAIN
    }
    if message.method:
        given["method"] = message.method
    if message.target_modules:
        given["target_modules"] = tuple(message.target_modules)
    for name, known in _ENUMS.items():
        number = getattr(message, name)
        if number and number not in known:
            text = f"spec.{name} has the unknown value {number}"
            raise InvalidArgument(
                "bad_hyperparameter",
                text,
                violations=[FieldViolation(f"spec.{name}", text, "bad_hyperparameter")],
            )
        if number:
            given[name] = known[number]
    return given


def spec_to_proto(spec: TrainingSpec) -> job_pb2.TrainingSpec:
    """Return the specification with every field set."""
    return job_pb2.TrainingSpec(
        method=spec.method,
        target_modules=spec.target_modules,
        overlong_policy=_OVERLONG[spec.overlong_policy],
        loss_scope=_SCOPES[spec.loss_scope],
        schedule=_SCHEDULES[spec.schedule],
        task_metric=_METRICS[spec.task_metric],
        **{name: getattr(spec, name) for name in _PLAIN},
    )


def job_to_proto(view: JobView) -> job_pb2.Job:
    """Return a job as callers see it."""
    job, request = view.job, view.job.request
    message = job_pb2.Job(
        id=job.id,
        state=STATES[view.state],
        base_model=request.base_model,
        training_file=request.training_file,
        validation_file=request.validation_file,
        adapter=request.adapter,
        spec=spec_to_proto(request.spec),
        seed=request.seed,
        metadata=request.metadata,
        create_time=_time(request.create_time),
        start_time=_optional_time(job.start_time),
        end_time=_optional_time(job.end_time),
        trained_tokens=job.trained_tokens,
        attempts=job.attempts,
        progress=None if job.progress is None else progress_to_proto(job.progress),
        dataset=None if job.dataset is None else report_to_proto(job.dataset),
        estimate=None if job.estimate is None else _estimate_to_proto(job.estimate),
        result=_result_to_proto(job),
    )
    if job.failure is not None:
        message.error.CopyFrom(to_status(job.failure.to_error()))
    return message


def event_to_proto(job_id: str, record: Record) -> job_pb2.JobEvent:
    """Return a record as the event that watchers see."""
    draft = record.draft
    return job_pb2.JobEvent(
        id=event_id(job_id, record.sequence),
        job_id=job_id,
        create_time=_time(record.time),
        level=_LEVELS[draft.level],
        message=draft.message,
        metrics=None if draft.metrics is None else progress_to_proto(draft.metrics),
        state=job_pb2.JOB_STATE_UNSPECIFIED if draft.state is None else STATES[draft.state],
        data=draft.data,
    )


def checkpoint_to_proto(
    job_id: str, checkpoint: Checkpoint, *, fine_tuned_model: str, report: CheckpointReport | None
) -> job_pb2.Checkpoint:
    """Return a checkpoint with the version it is, if any, and what was measured when it was to be one."""
    message = job_pb2.Checkpoint(
        id=checkpoint.id,
        job_id=job_id,
        step=checkpoint.step,
        create_time=_time(checkpoint.create_time),
        train_loss=checkpoint.train_loss,
        valid_loss=checkpoint.valid_loss,
        valid_mean_token_accuracy=checkpoint.valid_mean_token_accuracy,
        fine_tuned_model=fine_tuned_model,
    )
    if report is not None:
        message.evaluation.extend(_figures_to_proto(report.evaluation))
        message.collapsed = bool(report.collapsed)
        message.conversion_error = report.conversion_error
        if report.parity is not None:
            message.parity.CopyFrom(_parity_to_proto(report.parity))
    return message


def progress_to_proto(progress: Progress) -> job_pb2.Progress:
    """Return the figures of a step."""
    return job_pb2.Progress(**{name: getattr(progress, name) for name in progress.__dataclass_fields__})


def report_to_proto(report: DatasetReport) -> job_pb2.DatasetReport:
    """Return a report on data."""
    plain = {name: getattr(report, name) for name in report.__dataclass_fields__}
    plain["supervised_histogram"] = [
        job_pb2.HistogramBucket(up_to_tokens=bucket.up_to_tokens, rows=bucket.rows)
        for bucket in report.supervised_histogram
    ]
    warnings = [f"{count} {text}" for count, text in report.warnings.values()]
    return job_pb2.DatasetReport(**plain, warnings=warnings)


def method_to_proto(method: MethodCapability) -> trainer_service_pb2.MethodCapability:
    """Return what a method can do."""
    return trainer_service_pb2.MethodCapability(
        method=method.name,
        trains_on_nf4=method.trains_on_nf4,
        served_exactly=method.served_exactly,
        served_rank_factor=method.served_rank_factor,
        served_as=method.served_as,
        trains_jointly=method.trains_jointly,
        offered=method.offered,
        note=method.note,
    )


def _estimate_to_proto(estimate: Estimate) -> job_pb2.Estimate:
    return job_pb2.Estimate(
        tokens=estimate.tokens,
        steps=estimate.steps,
        minutes=estimate.minutes,
        memory_bytes=estimate.memory_bytes,
        total_bytes=estimate.total_bytes,
        limit_bytes=estimate.limit_bytes,
        minutes_basis=estimate.minutes_basis,
    )


def _result_to_proto(job: Job) -> job_pb2.JobResult | None:
    """Return what the job has made so far; None where that is nothing."""
    if all(part is None for part in (job.result, job.evaluation, job.parity, job.result_file)):
        return None
    message = job_pb2.JobResult(
        evaluation=_figures_to_proto(job.evaluation or ()),
        result_files=[] if job.result_file is None else [job.result_file],
        collapsed=bool(job.collapsed),
        conversion_error=job.conversion_error or 0.0,
        parity=None if job.parity is None else _parity_to_proto(job.parity),
    )
    if job.result is not None:
        message.adapter = job.result.adapter
        message.version = job.result.version
        message.digest = job.result.digest
        message.fine_tuned_model = job.result.fine_tuned_model
    return message


def _figures_to_proto(figures: Sequence[EvaluationMetric]) -> list[job_pb2.EvaluationMetric]:
    return [job_pb2.EvaluationMetric(**asdict(figure)) for figure in figures]


def _parity_to_proto(report: ParityReport) -> job_pb2.ParityReport:
    return job_pb2.ParityReport(**asdict(report))


def _time(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message


def _optional_time(time: datetime | None) -> Timestamp | None:
    return None if time is None else _time(time)
