"""Sampling parameters at the edges of their ranges; numbers in the ids are rows of the table of faults."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lorafleet.inference.v1.generation_pb2 import GenerateRequest, SamplingParams
from services.common.errors import InvalidArgument
from services.inference import validation
from services.inference.constraints.grammar import ConstraintKind

VOCAB_SIZE = 264
MAX_MODEL_LEN = 512

BAD = {
    "70 n": ({"n": 0}, "sampling.n"),
    "70 n above": ({"n": 17}, "sampling.n"),
    "70 n far above": ({"n": 10**9}, "sampling.n"),
    "71 temperature NaN": ({"temperature": math.nan}, "sampling.temperature"),
    "71 temperature infinite": ({"temperature": math.inf}, "sampling.temperature"),
    "71 temperature negative": ({"temperature": -1.0}, "sampling.temperature"),
    "71 temperature above": ({"temperature": 2.0001}, "sampling.temperature"),
    "72 top_p zero": ({"top_p": 0.0}, "sampling.top_p"),
    "72 top_p above": ({"top_p": 1.1}, "sampling.top_p"),
    "72 top_p NaN": ({"top_p": math.nan}, "sampling.top_p"),
    "72 top_k above": ({"top_k": VOCAB_SIZE + 1}, "sampling.top_k"),
    "72 min_p negative": ({"min_p": -0.1}, "sampling.min_p"),
    "72 min_p NaN": ({"min_p": math.nan}, "sampling.min_p"),
    "72 presence": ({"presence_penalty": 2.1}, "sampling.presence_penalty"),
    "72 frequency": ({"frequency_penalty": -2.1}, "sampling.frequency_penalty"),
    "72 frequency NaN": ({"frequency_penalty": math.nan}, "sampling.frequency_penalty"),
    "72 repetition zero": ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
    "72 repetition above": ({"repetition_penalty": 2.1}, "sampling.repetition_penalty"),
    "73 max_tokens": ({"max_tokens": 0}, "sampling.max_tokens"),
    "73 min above max": ({"max_tokens": 3, "min_tokens": 4}, "sampling.min_tokens"),
    "74 logprobs": ({"logprobs": 21}, "sampling.logprobs"),
    "74 prompt_logprobs": ({"prompt_logprobs": 10**6}, "sampling.prompt_logprobs"),
    "75 five stops": ({"stop": list("abcde")}, "sampling.stop"),
    "75 empty stop": ({"stop": ["a", ""]}, "sampling.stop[1]"),
    "75 long stop": ({"stop": ["x" * 257]}, "sampling.stop[0]"),
    "75 stop tokens": ({"stop_token_ids": [6] * 17}, "sampling.stop_token_ids"),
    "75 stop token outside": ({"stop_token_ids": [6, VOCAB_SIZE]}, "sampling.stop_token_ids[1]"),
    "76 bias outside": ({"logit_bias": {VOCAB_SIZE: 1.0}}, "sampling.logit_bias"),
    "76 many biases": ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "sampling.logit_bias"),
    "76 bias too large": ({"logit_bias": {5: 1e308}}, "sampling.logit_bias[5]"),
    "76 bias NaN": ({"logit_bias": {5: math.nan}}, "sampling.logit_bias[5]"),
}


@pytest.mark.parametrize(("fields", "field"), BAD.values(), ids=BAD)
def test_values_outside_their_range_are_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validation.sampling_params(SamplingParams(**fields), vocab_size=VOCAB_SIZE)
    error = caught.value
    assert (error.reason, error.field) == ("invalid_value", field)
    assert error.value
    assert error.limit


GOOD: list[dict[str, Any]] = [
    {"n": 1},
    {"n": 16},
    {"temperature": 0.0},
    {"temperature": 2.0},
    {"top_p": 5e-324},
    {"top_p": 1.0},
    {"top_k": VOCAB_SIZE},
    {"min_p": 1.0},
    {"repetition_penalty": 2.0},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 2.0},
    {"max_tokens": 1, "min_tokens": 1},
    {"logprobs": 0},
    {"logprobs": 20, "prompt_logprobs": 20},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
]


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_ends_of_the_ranges_are_taken_as_they_are(fields: dict[str, Any]) -> None:
    params = validation.sampling_params(SamplingParams(**fields), vocab_size=VOCAB_SIZE)
    assert {name: getattr(params, name) for name in fields} == fields


def test_every_field_reaches_the_engine() -> None:
    params = validation.sampling_params(
        SamplingParams(
            stop=["a" * 256, "b"],
            stop_token_ids=[7, 8, 7],
            logit_bias={5: -100.0, 6: 100.0},
            ignore_eos=True,
        ),
        vocab_size=VOCAB_SIZE,
    )
    assert params.stop == ("a" * 256, "b")
    assert params.stop_token_ids == {7, 8}
    assert dict(params.logit_bias) == {5: -100.0, 6: 100.0}
    assert params.ignore_eos


def test_absent_fields_take_the_contracts_defaults() -> None:
    params = validation.sampling_params(SamplingParams(), vocab_size=VOCAB_SIZE)
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (None, 1.0, 1.0, 0)
    assert (params.min_p, params.repetition_penalty) == (0.0, 1.0)
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
    assert (params.seed, params.logprobs, params.prompt_logprobs, params.n) == (None, None, None, 1)


@pytest.mark.parametrize("name", ["json_schema", "regex", "grammar"])
def test_a_constraint_alone_decides_where_to_end(name: str) -> None:
    kind = ConstraintKind(name)
    assert validation.constraint(SamplingParams(**{name: "x"})) == (kind, "x")  # type: ignore[arg-type]
    assert validation.constraint(SamplingParams()) is None
    others: list[dict[str, Any]] = [
        {"stop": ["a"]},
        {"stop_token_ids": [6]},
        {"min_tokens": 1},
        {"ignore_eos": True},
    ]
    for other in others:
        with pytest.raises(InvalidArgument) as caught:
            validation.constraint(SamplingParams(**{name: "x", **other}))
        assert (caught.value.reason, caught.value.field) == ("invalid_value", f"sampling.{next(iter(other))}")


def test_a_priority_is_within_its_range() -> None:
    assert [validation.priority(GenerateRequest(priority=priority)) for priority in (-100, 0, 100)] == [
        -100,
        0,
        100,
    ]
    for priority in (101, -101):
        with pytest.raises(InvalidArgument) as invalid:
            validation.priority(GenerateRequest(priority=priority))
        assert (invalid.value.reason, invalid.value.field) == ("invalid_value", "priority")


@pytest.mark.parametrize(
    ("prompt_tokens", "fields", "total"),
    [(MAX_MODEL_LEN, {}, 513), (500, {"max_tokens": 13}, 513), (1, {"max_tokens": 2**32 - 1}, 2**32)],
)
def test_78_room_is_told_with_both_numbers(prompt_tokens: int, fields: dict[str, Any], total: int) -> None:
    params = validation.sampling_params(SamplingParams(**fields), vocab_size=VOCAB_SIZE)
    with pytest.raises(InvalidArgument) as caught:
        validation.check_room(params, prompt_tokens, max_model_len=MAX_MODEL_LEN)
    error = caught.value
    assert error.reason == "context_length_exceeded"
    assert (error.value, error.limit) == (str(total), str(MAX_MODEL_LEN))


def test_78_the_last_token_fits() -> None:
    params = validation.sampling_params(SamplingParams(max_tokens=12), vocab_size=VOCAB_SIZE)
    validation.check_room(params, 500, max_model_len=MAX_MODEL_LEN)
    validation.check_room(
        validation.sampling_params(SamplingParams(), vocab_size=VOCAB_SIZE), 511, max_model_len=MAX_MODEL_LEN
    )


def test_minimum_above_the_room_and_empty_prompts_are_refused() -> None:
    params = validation.sampling_params(SamplingParams(min_tokens=13), vocab_size=VOCAB_SIZE)
    with pytest.raises(InvalidArgument) as caught:
        validation.check_room(params, 500, max_model_len=MAX_MODEL_LEN)
    assert (caught.value.reason, caught.value.field) == ("invalid_value", "sampling.min_tokens")
    with pytest.raises(InvalidArgument) as caught:
        validation.check_room(params, 0, max_model_len=MAX_MODEL_LEN)
    assert (caught.value.reason, caught.value.field) == ("invalid_value", "prompt")
