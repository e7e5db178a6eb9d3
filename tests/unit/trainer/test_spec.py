"""Hyperparameters: defaults, ranges, and the refusal of what lies outside (row 56)."""

from __future__ import annotations

import dataclasses

import pytest

from lorafleet.trainer.v1 import job_pb2
from services.common.errors import InvalidArgument
from services.trainer.conversion import given_spec, spec_to_proto
from services.trainer.spec import Schedule, TrainingSpec, resolve_spec

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]


def resolved(**fields: object) -> TrainingSpec:
    return resolve_spec(fields, max_model_len=512, module_names=MODULES)


def test_defaults() -> None:
    spec = resolved()
    assert (spec.method, spec.rank, spec.alpha, spec.max_seq_len) == ("lora", 16, 32.0, 512)
    assert spec.target_modules == ("q_proj", "up_proj")
    assert resolve_spec({}, max_model_len=8192, module_names=MODULES).max_seq_len == 2048


def test_alpha_follows_the_rank() -> None:
    assert resolved(rank=4).alpha == 8.0
    assert resolved(rank=4, alpha=1.0).alpha == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", 1e9),
        ("n_epochs", 0),
        ("n_epochs", 51),
        ("batch_size", 10**6),
        ("rank", 0),
        ("rank", 4096),
        ("alpha", 0.0),
        ("alpha", float("inf")),
        ("dropout", 1.0),
        ("warmup_ratio", 0.6),
        ("max_grad_norm", 0.0),
        ("max_seq_len", 7),
        ("max_seq_len", 513),
        ("validation_fraction", 0.51),
        ("checkpoint_steps", 0),
        ("evaluation_rows", 1001),
        ("weight_decay", -0.1),
        ("gradient_accumulation_steps", 257),
        ("early_stopping_patience", 101),
        ("minutes_budget", -1.0),
        ("minutes_budget", float("nan")),
    ],
)
def test_row_56_out_of_range_is_refused_by_name_and_range(field: str, value: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolved(**{field: value})
    assert caught.value.reason == "bad_hyperparameter"
    assert [violation.field for violation in caught.value.violations] == [f"spec.{field}"]
    assert "must be" in caught.value.message


def test_all_bad_fields_are_named_at_once() -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolved(rank=0, n_epochs=0, target_modules=("lm_head",))
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {"spec.rank", "spec.n_epochs", "spec.target_modules"}


def test_unknown_method_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolved(method="ia3")
    assert caught.value.reason == "unsupported_method"
    assert "lora, rslora, lora+, dora" in str(caught.value.limit)


def test_message_gives_what_was_set_and_nothing_else() -> None:
    message = job_pb2.TrainingSpec(rank=0, schedule=job_pb2.SCHEDULE_LINEAR, gradient_checkpointing=True)
    assert given_spec(message) == {"rank": 0, "schedule": Schedule.LINEAR, "gradient_checkpointing": True}


def test_unknown_enum_value_is_refused() -> None:
    message = job_pb2.TrainingSpec.FromString(b"\x50\x63")
    with pytest.raises(InvalidArgument) as caught:
        given_spec(message)
    assert caught.value.violations[0].field == "spec.schedule"


def test_resolved_specification_survives_the_wire() -> None:
    spec = dataclasses.replace(resolved(), schedule=Schedule.CONSTANT, dropout=0.25)
    given = given_spec(spec_to_proto(spec))
    assert resolve_spec(given, max_model_len=512, module_names=MODULES) == spec


def test_recipe_gives_defaults_that_the_caller_can_override() -> None:
    modules = [*MODULES, "model.layers.0.self_attn.v_proj"]
    paper = resolve_spec({"recipe": "paper"}, max_model_len=512, module_names=modules)
    assert (paper.rank, paper.alpha, paper.dropout) == (8, 16.0, 0.05)
    assert paper.target_modules == ("q_proj", "v_proj")
    assert (paper.batch_size, paper.gradient_accumulation_steps) == (1, 16)
    assert (paper.schedule, paper.warmup_ratio, paper.learning_rate) == (Schedule.COSINE, 0.03, 2e-4)
    changed = resolve_spec({"recipe": "paper", "rank": 4}, max_model_len=512, module_names=modules)
    assert (changed.rank, changed.dropout) == (4, 0.05)
    assert resolved(recipe="default") == resolved()


@pytest.mark.parametrize("field", ["recipe", "optimizer"])
def test_unknown_names_are_refused_with_those_known(field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolved(**{field: "sgd"})
    assert [violation.field for violation in caught.value.violations] == [f"spec.{field}"]
    assert "choose one of" in caught.value.message


def test_ratio_of_learning_rates_belongs_to_its_method() -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolved(lora_plus_ratio=4.0)
    assert [violation.field for violation in caught.value.violations] == ["spec.lora_plus_ratio"]
