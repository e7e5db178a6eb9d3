"""The cards of the versions that a job and its checkpoints make, and the names of those versions."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

from lorafleet.registry.v1 import adapter_pb2
from services.common.prompts import PromptEncoder
from services.trainer.figures import CHECKPOINT_VALIDATION_ROWS
from services.trainer.job import Checkpoint, CheckpointReport, EvaluationMetric, Job, JobResult

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "lorafleet")


def model_card(job: Job, encoder: PromptEncoder) -> adapter_pb2.ModelCard:
    """Return the card of the version that `job` makes: how to train it again, and what was measured.

    It follows from the job's history alone, so that publishing again after a crash sends the same card.
    """
    request = job.request
    assert job.dataset is not None, "a job that trained was validated"
    spec = request.spec
    hyperparameters = {
        name: _text(getattr(spec, name)) for name in spec.__dataclass_fields__ if name != "method"
    }
    return adapter_pb2.ModelCard(
        base_model=request.base_model,
        method=spec.method,
        hyperparameters=hyperparameters,
        training_data_digest=job.dataset.digest,
        training_rows=job.dataset.rows,
        trained_tokens=job.trained_tokens,
        seed=request.seed,
        metrics=[
            *(metric for figure in job.evaluation or () for metric in _metrics(figure)),
            *_checks(job),
            *_parity(job),
        ],
        job_id=job.id,
        stop_token_ids=sorted(encoder.eos_token_ids),
        libraries={name: version(name) for name in _LIBRARIES},
    )


def checkpoint_card(
    job: Job, checkpoint: Checkpoint, encoder: PromptEncoder, report: CheckpointReport
) -> adapter_pb2.ModelCard:
    """Return the card of a checkpoint's version: the job's, with what was measured of that checkpoint."""
    then = replace(
        job,
        trained_tokens=checkpoint.trained_tokens,
        evaluation=report.evaluation,
        parity=report.parity,
        collapsed=report.collapsed,
        conversion_error=report.conversion_error,
    )
    card = model_card(then, encoder)
    card.description = f"Checkpoint {checkpoint.id} at step {checkpoint.step} of job {job.id}."
    if report.evaluation:
        return card
    assert job.dataset is not None, "a job that trained was validated"
    rows = min(job.dataset.validation_rows, CHECKPOINT_VALIDATION_ROWS)
    measured = {"loss": checkpoint.valid_loss, "token_accuracy": checkpoint.valid_mean_token_accuracy}
    card.metrics.extend(
        adapter_pb2.Metric(name=name, subject="adapter", value=value, rows=rows, split="validation")
        for name, value in measured.items()
        if value is not None
    )
    return card


def job_result(job: Job, published: adapter_pb2.AdapterVersion) -> JobResult:
    """Return what was made of the job, or of one of its checkpoints."""
    request = job.request
    number = published.version
    return JobResult(
        adapter=published.adapter,
        version=number,
        digest=published.digest,
        fine_tuned_model=f"ft:{request.base_model}:{request.tenant}:{published.adapter}:v{number}",
    )


def _metrics(figure: EvaluationMetric) -> list[adapter_pb2.Metric]:
    base = adapter_pb2.Metric(
        name=figure.name, subject="base", value=figure.base_value, rows=figure.rows, split="validation"
    )
    adapter = adapter_pb2.Metric(
        name=figure.name,
        subject="adapter",
        value=figure.adapter_value,
        rows=figure.rows,
        split="validation",
        ci_low=figure.ci_low,
        ci_high=figure.ci_high,
    )
    return [base, adapter]


def _checks(job: Job) -> list[adapter_pb2.Metric]:
    """Return whether the adapter has collapsed, and how far what is published is from what was trained."""
    found = {"collapsed": job.collapsed, "conversion_error": job.conversion_error}
    return [
        adapter_pb2.Metric(name=name, subject="adapter", value=float(value), split="validation")
        for name, value in found.items()
        if value is not None
    ]


def _parity(job: Job) -> list[adapter_pb2.Metric]:
    """Return the card's word on the parity gate; none where there was no gate."""
    report = job.parity
    if report is None:
        return []
    value = report.max_difference
    return [
        adapter_pb2.Metric(name="parity_max_difference", subject="adapter", value=value, rows=report.rows)
    ]


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
