"""Fine-tuning requests into the contract, and jobs, events and checkpoints out of it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2

from lorafleet.trainer.v1 import job_pb2 as job
from services.common.errors import InvalidArgument, NotFound
from services.gateway.job_object import checkpoint_object, event_object, job_object
from services.gateway.job_request import JobRequest
from services.gateway.json_body import check

REQUIRED_KEYS = {
    "id", "object", "created_at", "finished_at", "model", "fine_tuned_model", "organization_id", "status",
    "training_file", "validation_file", "result_files", "trained_tokens", "hyperparameters", "method", "seed",
    "estimated_finish", "integrations", "metadata", "error",
}  # fmt: skip


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny-base", "training_file": "file-1", **changes}


def supervised(**parts: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": parts}


def spec_of(**changes: Any) -> job.TrainingSpec:
    return check(JobRequest, body(**changes)).create_request(None).spec


def test_everything_arrives() -> None:
    options: dict[str, Any] = {
        "method": "rslora", "rank": 8, "alpha": 16.5, "dropout": 0.1, "target_modules": ["q_proj"],
        "learning_rate": 0.001, "gradient_accumulation_steps": 2, "schedule": "linear", "warmup_ratio": 0.1,
        "weight_decay": 0.01, "max_grad_norm": 0.5, "max_seq_len": 128, "overlong_policy": "drop",
        "loss_scope": "all", "validation_fraction": 0.2, "checkpoint_steps": 7,
        "gradient_checkpointing": True, "task_metric": "rouge_l",
        "evaluation_rows": 9, "recipe": "paper", "optimizer": "adamw_8bit", "packing": True,
        "group_by_length": True, "lora_plus_ratio": 4.0, "early_stopping_patience": 2,
        "token_budget": 10**12, "minutes_budget": 1.5, "joint": True, "strict": True,
    }  # fmt: skip
    method = supervised(hyperparameters={"n_epochs": 2, "batch_size": 3}, lorafleet=options)
    request = check(
        JobRequest,
        body(method=method, suffix="support", seed=7, metadata={"a": "b"}, validation_file="file-2"),
    ).create_request("key-1")
    assert (request.base_model, request.training_file, request.validation_file) == (
        "tiny-base",
        "file-1",
        "file-2",
    )
    assert (request.adapter, request.seed, dict(request.metadata)) == ("support", 7, {"a": "b"})
    assert request.idempotency_key == "key-1"
    expected = job.TrainingSpec(
        **options
        | {
            "schedule": job.SCHEDULE_LINEAR,
            "overlong_policy": job.OVERLONG_POLICY_DROP,
            "loss_scope": job.LOSS_SCOPE_ALL,
            "task_metric": job.TASK_METRIC_ROUGE_L,
        },
        n_epochs=2,
        batch_size=3,
    )
    assert request.spec == expected
    assert all(
        field.name in {f.name for f, _ in request.spec.ListFields()} for field in expected.DESCRIPTOR.fields
    )


def test_auto_and_absent_leave_it_to_the_trainer() -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert spec_of(method=supervised(hyperparameters=auto)) == job.TrainingSpec()
    assert not check(JobRequest, body()).create_request(None).HasField("seed")


def test_method_wins_over_the_old_hyperparameters() -> None:
    old = {"n_epochs": 9}
    assert spec_of(hyperparameters=old).n_epochs == 9
    assert not spec_of(hyperparameters=old, method=supervised()).HasField("n_epochs")
    assert spec_of(hyperparameters=old, method=supervised(hyperparameters={"n_epochs": 2})).n_epochs == 2


def test_the_multiplier_multiplies_the_default_rate() -> None:
    spec = spec_of(hyperparameters={"learning_rate_multiplier": 2})
    assert spec.learning_rate == pytest.approx(4e-4)
    shown = job_object(job.Job(state=job.JOB_STATE_QUEUED, spec=spec), "acme")
    assert shown["hyperparameters"]["learning_rate_multiplier"] == 2


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"method": {"type": "dpo", "dpo": {}}}, "method.dpo", "unsupported_parameter"),
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_parameter"),
        ({"integrations": []}, "integrations", "unsupported_parameter"),
        (
            {"method": supervised(lorafleet={"ranks": 1})},
            "method.supervised.lorafleet.ranks",
            "unsupported_parameter",
        ),
        ({"method": supervised(lorafleet={"rank": -1})}, "method.supervised.lorafleet.rank", "invalid_value"),
        (
            {"method": supervised(hyperparameters={"n_epochs": True})},
            "method.supervised.hyperparameters.n_epochs",
            "invalid_value",
        ),
        (
            {
                "method": supervised(
                    hyperparameters={"learning_rate_multiplier": 1}, lorafleet={"learning_rate": 0.1}
                )
            },
            "method.supervised.hyperparameters.learning_rate_multiplier",
            "invalid_value",
        ),
        ({"seed": 2**31}, "seed", "invalid_value"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata", "invalid_value"),
        ({"training_file": None}, "training_file", "invalid_value"),
    ],
)
def test_what_is_refused(change: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(JobRequest, body(**change))
    assert (caught.value.field, caught.value.reason) == (field, reason)


@pytest.mark.parametrize("model", [None, "", "ft:tiny-base:acme:support:v1", "../base", "A"])
def test_only_a_base_can_be_tuned(model: str | None) -> None:
    with pytest.raises(NotFound, match="model_not_found"):
        check(JobRequest, body(model=model)).create_request(None)


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (job.JOB_STATE_VALIDATING_FILES, "validating_files"),
        (job.JOB_STATE_QUEUED, "queued"),
        (job.JOB_STATE_RUNNING, "running"),
        (job.JOB_STATE_PAUSED, "paused"),
        (job.JOB_STATE_CANCELLING, "running"),
        (job.JOB_STATE_SUCCEEDED, "succeeded"),
        (job.JOB_STATE_FAILED, "failed"),
        (job.JOB_STATE_CANCELLED, "cancelled"),
    ],
)
def test_states(state: job.JobState.ValueType, status: str) -> None:
    shown = job_object(job.Job(state=state), "acme")
    assert shown["status"] == status
    assert shown.keys() == REQUIRED_KEYS | {"lorafleet"}


def test_a_running_job_estimates_its_end() -> None:
    running = job.Job(
        state=job.JOB_STATE_RUNNING,
        start_time=Timestamp(seconds=1000),
        estimate=job.Estimate(minutes=2),
    )
    assert job_object(running, "acme")["estimated_finish"] == 1120
    running.progress.eta_seconds = 60
    assert job_object(running, "acme")["estimated_finish"] == pytest.approx(time.time() + 60, abs=2)
    running.state = job.JOB_STATE_SUCCEEDED
    assert job_object(running, "acme")["estimated_finish"] is None


def test_a_failed_job_names_every_bad_line() -> None:
    failed = job.Job(state=job.JOB_STATE_FAILED)
    failed.error.message = "the training file has 2 bad lines"
    failed.error.details.add().Pack(
        error_details_pb2.ErrorInfo(reason="invalid_dataset", metadata={"field": "training_file"})
    )
    violations = error_details_pb2.BadRequest()
    violations.field_violations.add(field="training_file.lines[3]", description="line 3: no JSON")
    violations.field_violations.add(field="training_file.lines[9]", description="line 9: no completion")
    failed.error.details.add().Pack(violations)
    assert job_object(failed, "acme")["error"] == {
        "code": "invalid_dataset",
        "message": "the training file has 2 bad lines\nline 3: no JSON\nline 9: no completion",
        "param": "training_file",
    }


def test_metrics_events_hold_numbers_and_never_nan() -> None:
    event = job.JobEvent(
        id="ftevent-1",
        create_time=Timestamp(seconds=5),
        level=job.EVENT_LEVEL_WARN,
        message="Step 3/10: loss 0.5",
        metrics=job.Progress(step=3, total_steps=10, loss=0.5, gradient_norm=float("nan")),
        data={"rows": 2.0},
    )
    shown = event_object(event)
    assert {**shown, "data": None} == {
        "id": "ftevent-1",
        "object": "fine_tuning.job.event",
        "created_at": 5,
        "level": "warn",
        "message": "Step 3/10: loss 0.5",
        "type": "metrics",
        "data": None,
    }
    assert shown["data"]["train_loss"] == 0.5
    assert (shown["data"]["step"], shown["data"]["gradient_norm"], shown["data"]["rows"]) == (3, None, 2.0)


def test_a_change_of_state_is_a_message_with_its_status() -> None:
    shown = event_object(
        job.JobEvent(level=job.EVENT_LEVEL_INFO, message="done", state=job.JOB_STATE_SUCCEEDED)
    )
    assert (shown["type"], shown["data"]) == ("message", {"status": "succeeded"})


def test_checkpoints() -> None:
    shown = checkpoint_object(
        job.Checkpoint(id="ftckpt-1", job_id="ftjob-1", step=50, train_loss=0.25, valid_loss=0.5)
    )
    assert shown["step_number"] == 50
    assert shown["metrics"] == {
        "step": 50,
        "train_loss": 0.25,
        "valid_loss": 0.5,
        "valid_mean_token_accuracy": None,
    }
