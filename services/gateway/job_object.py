"""Jobs, events and checkpoints as OpenAI's objects."""

from __future__ import annotations

import math
import time
from typing import Any

from google.rpc import error_details_pb2

from lorafleet.trainer.v1.job_pb2 import Checkpoint, EventLevel, Job, JobEvent, JobState, TrainingSpec
from services.gateway.job_request import DEFAULT_LEARNING_RATE
from services.gateway.plain import plain

_STATUS: dict[JobState.ValueType, str] = {
    JobState.JOB_STATE_VALIDATING_FILES: "validating_files",
    JobState.JOB_STATE_QUEUED: "queued",
    JobState.JOB_STATE_RUNNING: "running",
    JobState.JOB_STATE_PAUSED: "paused",
    # OpenAI's API has no word for it; the job still runs to its next step.
    JobState.JOB_STATE_CANCELLING: "running",
    JobState.JOB_STATE_SUCCEEDED: "succeeded",
    JobState.JOB_STATE_FAILED: "failed",
    JobState.JOB_STATE_CANCELLED: "cancelled",
}
_LEVELS: dict[EventLevel.ValueType, str] = {
    EventLevel.EVENT_LEVEL_INFO: "info",
    EventLevel.EVENT_LEVEL_WARN: "warn",
    EventLevel.EVENT_LEVEL_ERROR: "error",
}
_ENDED = frozenset({JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_FAILED, JobState.JOB_STATE_CANCELLED})
# `loss` has another name in OpenAI's events.
_EVENT_NAMES = {"loss": "train_loss"}


def job_object(job: Job, tenant: str) -> dict[str, Any]:
    """Return OpenAI's job object; what it has no place for is in `lorafleet`."""
    hyperparameters = _hyperparameters(job.spec)
    options = {
        name: value
        for name, value in plain(job.spec).items()
        if value not in (None, [], "") and name not in ("batch_size", "n_epochs")
    }
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.create_time.seconds,
        "finished_at": job.end_time.seconds if job.HasField("end_time") else None,
        "model": job.base_model,
        "fine_tuned_model": job.result.fine_tuned_model or None,
        "organization_id": tenant,
        "status": _STATUS[job.state],
        "training_file": job.training_file,
        "validation_file": job.validation_file or None,
        "result_files": list(job.result.result_files),
        "trained_tokens": job.trained_tokens or None,
        "hyperparameters": hyperparameters,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": hyperparameters, "lorafleet": options},
        },
        "seed": job.seed,
        "estimated_finish": _estimated_finish(job),
        "integrations": [],
        "metadata": dict(job.metadata),
        "error": _error(job) if job.HasField("error") else None,
        "lorafleet": {
            "adapter": job.adapter,
            "version": job.result.version or None,
            "digest": job.result.digest or None,
            "started_at": job.start_time.seconds if job.HasField("start_time") else None,
            "attempts": job.attempts,
            "progress": plain(job.progress) if job.HasField("progress") else None,
            "dataset": plain(job.dataset) if job.HasField("dataset") else None,
            "estimate": plain(job.estimate) if job.HasField("estimate") else None,
            "evaluation": [plain(metric) for metric in job.result.evaluation],
            "collapsed": job.result.collapsed,
            "conversion_error": job.result.conversion_error,
            "parity": plain(job.result.parity) if job.result.HasField("parity") else None,
        },
    }


def event_object(event: JobEvent) -> dict[str, Any]:
    """Return OpenAI's event object; the figures of a metrics event are in `data`."""
    data: dict[str, Any] = dict(event.data)
    if event.HasField("metrics"):
        metrics = plain(event.metrics)
        data |= {_EVENT_NAMES.get(name, name): value for name, value in metrics.items()}
    if event.state != JobState.JOB_STATE_UNSPECIFIED:
        data["status"] = _STATUS[event.state]
    finite = {name: None if _is_nan(value) else value for name, value in data.items()}
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.create_time.seconds,
        "level": _LEVELS[event.level],
        "message": event.message,
        "type": "metrics" if event.HasField("metrics") else "message",
        "data": finite,
    }


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return OpenAI's checkpoint object; the model's name is empty where the checkpoint was not published."""
    measured = plain(checkpoint)
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.create_time.seconds,
        "fine_tuning_job_id": checkpoint.job_id,
        "fine_tuned_model_checkpoint": checkpoint.fine_tuned_model,
        "step_number": checkpoint.step,
        "metrics": {
            name: measured[name] for name in ("step", "train_loss", "valid_loss", "valid_mean_token_accuracy")
        },
    }


def _hyperparameters(spec: TrainingSpec) -> dict[str, Any]:
    multiplier = spec.learning_rate / DEFAULT_LEARNING_RATE
    return {
        "batch_size": spec.batch_size if spec.HasField("batch_size") else "auto",
        # The quotient of two decimal fractions, without the dust of binary ones.
        "learning_rate_multiplier": float(f"{multiplier:.12g}") if spec.HasField("learning_rate") else "auto",
        "n_epochs": spec.n_epochs if spec.HasField("n_epochs") else "auto",
    }


def _estimated_finish(job: Job) -> int | None:
    """Return the Unix second at which a job should end, from its progress or, before that, its estimate."""
    if job.state in _ENDED or not job.HasField("start_time"):
        return None
    if job.HasField("progress") and math.isfinite(job.progress.eta_seconds):
        return int(time.time() + job.progress.eta_seconds)
    if job.HasField("estimate"):
        return int(job.start_time.seconds + job.estimate.minutes * 60)
    return None


def _error(job: Job) -> dict[str, Any]:
    """Return what ended a job: code, message with every bad line of its files, and parameter."""
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in job.error.details:
        for known in (info, bad_request):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
    lines = [violation.description for violation in bad_request.field_violations]
    return {
        "code": info.reason or "unknown",
        "message": "\n".join([job.error.message, *lines]),
        "param": info.metadata.get("field"),
    }


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
