"""Strict JSON bodies and the names that errors give to fields."""

from __future__ import annotations

import time

import pytest

from services.common.errors import InvalidArgument, ResourceExhausted
from services.gateway.chat_request import ChatRequest
from services.gateway.completion_request import CompletionRequest
from services.gateway.json_body import MAX_DEPTH, check, parse


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nothing",
        b'{"model": "m"',
        b"[]",
        b'"text"',
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
    ],
)
def test_row_66_67_bad_json(data: bytes) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(data)
    assert caught.value.reason == "invalid_json"


def test_row_67_a_million_keys_cost_next_to_nothing() -> None:
    data = b"{" + b",".join(b'"%d":1' % number for number in range(1_000_000)) + b"}"
    started = time.process_time()
    with pytest.raises(ResourceExhausted) as caught:
        parse(data)
    assert caught.value.reason == "too_large"
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user"}]},
            "messages[1].content",
            "missing_required_parameter",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
            "messages[0].tool_calls[0]",
            "invalid_value",
        ),
        ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"temperature": 9, "functions": []}, "functions", "unsupported_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
    ],
)
def test_errors_name_the_field(change: dict[str, object], field: str, reason: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **change}
    with pytest.raises(InvalidArgument) as caught:
        check(ChatRequest, body)
    assert (caught.value.field, caught.value.reason) == (field, reason)


def test_null_asks_for_nothing() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "a", "refusal": None, "tool_calls": None}],
        "tools": None,
        "stop": None,
        "temperature": None,
    }
    assert check(ChatRequest, body).temperature is None


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_the_four_kinds_of_prompt(prompt: object, prompts: list[object]) -> None:
    assert check(CompletionRequest, {"model": "m", "prompt": prompt}).prompts == prompts


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [1, [2]], [True], [-1], [2**32], None, 5, [1.5]])
def test_prompts_that_are_none_of_them(prompt: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(CompletionRequest, {"model": "m", "prompt": prompt})
    assert (caught.value.field or "").startswith("prompt")


def test_too_many_choices_are_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(CompletionRequest, {"model": "m", "prompt": ["a"] * 64, "n": 3})
    assert caught.value.field == "n"


def test_developer_is_system_and_text_parts_are_joined() -> None:
    body = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
    }
    messages = check(ChatRequest, body).prompt().messages
    assert [(message.role, message.content) for message in messages] == [
        ("system", "be brief"),
        ("user", "ab"),
    ]
