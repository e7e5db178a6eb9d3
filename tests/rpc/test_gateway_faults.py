"""Bad requests, by their rows in the fault catalogue: each refused by name and cheaply, by the gateway."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from services.common.errors import DeadlineExceeded, InvalidArgument, LorafleetError
from tests.support.fake_base import BASE
from tests.support.fake_inference import Script
from tests.support.gateway import GatewayUnderTest, running_gateway

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON = {"content-type": "application/json"}
WITH_TEMPERATURE = b'{"model":"tiny-base","messages":[{"role":"user","content":"a"}],"temperature":%b}'


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [{"role": "user", "content": "hi"}], **changes}


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": BASE, "prompt": "hi", **changes}


def refused(gateway: GatewayUnderTest, path: str, **request: Any) -> tuple[int, dict[str, Any]]:
    """Return status and error of a request that must not reach inference, nor cost much."""
    before = len(gateway.inference.requests)
    with gateway.http() as http:
        response = http.post(path, **request)
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert len(gateway.inference.requests) == before
    return response.status_code, body["error"]


@pytest.mark.parametrize(
    ("row", "content", "headers", "status", "code"),
    [
        (66, b"nothing", JSON, 400, "invalid_json"),
        (66, json.dumps(chat()).encode()[:-5], JSON, 400, "invalid_json"),
        (66, b'{"model": "a", "model": "b", "messages": []}', JSON, 400, "invalid_json"),
        (66, json.dumps(chat()).encode(), {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (66, json.dumps(chat()).encode(), {}, 415, "unsupported_media_type"),
        (67, b'{"messages":' + b"[" * 100_000, JSON, 400, "invalid_json"),
        (67, b'{"messages": "' + b"x" * (5 << 20) + b'"}', JSON, 413, "too_large"),
        (67, b'{"a":[' + b"1," * 1_000_000 + b"1]}", JSON, 413, "too_large"),
        (71, WITH_TEMPERATURE % b"NaN", JSON, 400, "invalid_json"),
        (71, WITH_TEMPERATURE % b"Infinity", JSON, 400, "invalid_json"),
        (71, WITH_TEMPERATURE % b"1e999", JSON, 400, "invalid_value"),
        (79, b'{"messages":[{"role":"user","content":"\\ud800"}]}', JSON, 400, "invalid_json"),
    ],
)  # fmt: skip
def test_bodies(
    gateway: GatewayUnderTest, row: int, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    got, error = refused(gateway, CHAT, content=content, headers=headers)
    assert (got, error["code"]) == (status, code), row


@pytest.mark.parametrize("declared", [True, False])
def test_row_67_a_large_body_is_not_read_to_its_end(gateway: GatewayUnderTest, declared: bool) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1600):
            sent += 1
            yield b"x" * 65536

    headers = {**JSON, **({"content-length": str(100 << 20)} if declared else {})}
    with gateway.http() as http:
        response = http.post(CHAT, content=body(), headers=headers)
    assert response.status_code == 413
    assert sent < 1600


OUT_OF_RANGE = [
    (68, {"unheard_of": 1}, "unheard_of", "unsupported_parameter"),
    (68, {"best_of": 3}, "best_of", "unsupported_parameter"),
    (70, {"n": 0}, "n", "invalid_value"),
    (70, {"n": -1}, "n", "invalid_value"),
    (70, {"n": 129}, "n", "invalid_value"),
    (70, {"n": 10**9}, "n", "invalid_value"),
    (70, {"n": 1.5}, "n", "invalid_value"),
    (70, {"n": True}, "n", "invalid_value"),
    (71, {"temperature": -1}, "temperature", "invalid_value"),
    (71, {"temperature": 3}, "temperature", "invalid_value"),
    (71, {"temperature": "hot"}, "temperature", "invalid_value"),
    (72, {"top_p": 0}, "top_p", "invalid_value"),
    (72, {"top_p": 1.1}, "top_p", "invalid_value"),
    (72, {"top_k": -1}, "top_k", "invalid_value"),
    (72, {"min_p": 1.5}, "min_p", "invalid_value"),
    (72, {"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    (72, {"presence_penalty": 2.1}, "presence_penalty", "invalid_value"),
    (72, {"frequency_penalty": -2.1}, "frequency_penalty", "invalid_value"),
    (73, {"max_tokens": -1}, "max_tokens", "invalid_value"),
    (73, {"max_tokens": 0}, "max_tokens", "invalid_value"),
    (73, {"max_tokens": 10**12}, "max_tokens", "invalid_value"),
    (75, {"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
    (75, {"stop": ""}, "stop", "invalid_value"),
    (75, {"stop": "x" * (1 << 20)}, "stop", "invalid_value"),
    (76, {"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    (76, {"logit_bias": {str(2**32): 1}}, "logit_bias", "invalid_value"),
    (76, {"logit_bias": {"07": 1}}, "logit_bias", "invalid_value"),
    (76, {"logit_bias": {"7": 1e308}}, "logit_bias.7", "invalid_value"),
    (76, {"logit_bias": {str(number): 0 for number in range(10_000)}}, "logit_bias", "invalid_value"),
    (77, {"seed": 2**63}, "seed", "invalid_value"),
    (77, {"seed": -(2**63) - 1}, "seed", "invalid_value"),
]
USER = {"role": "user", "content": "a"}
CHAT_ONLY = [
    (68, {"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    (68, {"tools": [{"type": "custom", "custom": {}}]}, "tools[0].custom", "unsupported_parameter"),
    (68, {"tool_choice": "required"}, "tool_choice", "invalid_value"),
    (68, {"response_format": {"type": "grammar"}}, "response_format", "invalid_value"),
    (68, {"modalities": ["audio"]}, "modalities[0]", "invalid_value"),
    (73, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "invalid_value"),
    (73, {"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    (74, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    (74, {"logprobs": True, "top_logprobs": 10**6}, "top_logprobs", "invalid_value"),
    (74, {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    (79, {"messages": []}, "messages", "invalid_value"),
    (79, {"messages": [{"role": "system", "content": "a"}]}, "messages[0]", "invalid_value"),
    (79, {"messages": [USER, {"role": "robot", "content": "a"}]}, "messages[1].role", "invalid_value"),
    (79, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
    (80, {"chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter"),
    (80, {"chat_template_kwargs": {}}, "chat_template_kwargs", "unsupported_parameter"),
    (86, {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
]  # fmt: skip
COMPLETIONS_ONLY = [
    (68, {"suffix": "x"}, "suffix", "unsupported_parameter"),
    (74, {"logprobs": 21}, "logprobs", "invalid_value"),
    (78, {"prompt": ["x"] * 129}, "prompt", "invalid_value"),
]


@pytest.mark.parametrize(("row", "change", "param", "code"), OUT_OF_RANGE + COMPLETIONS_ONLY)
def test_completion_fields(
    gateway: GatewayUnderTest, row: int, change: dict[str, Any], param: str, code: str
) -> None:
    status, error = refused(gateway, COMPLETIONS, json=completion(**change))
    assert (status, error["code"], error["param"]) == (400, code, param), row


@pytest.mark.parametrize(("row", "change", "param", "code"), OUT_OF_RANGE + CHAT_ONLY)
def test_chat_fields(
    gateway: GatewayUnderTest, row: int, change: dict[str, Any], param: str, code: str
) -> None:
    status, error = refused(gateway, CHAT, json=chat(**change))
    assert (status, error["code"], error["param"]) == (400, code, param), row


@pytest.mark.parametrize(
    "model", ["unknown", "", None, "x" * 10_000, "../../etc/passwd", "tiny-base:", "ft:tiny-base:other:a:v1"]
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_row_69_no_model_and_never_the_base(gateway: GatewayUnderTest, path: str, model: str | None) -> None:
    started = gateway.inference.started
    body = chat(model=model) if path == CHAT else completion(model=model)
    with gateway.http() as http:
        response = http.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert gateway.inference.started == started


def test_a_missing_model_is_named(gateway: GatewayUnderTest) -> None:
    status, error = refused(gateway, CHAT, json={"messages": [{"role": "user", "content": "a"}]})
    assert (status, error["code"], error["param"]) == (400, "missing_required_parameter", "model")


def test_row_78_inference_says_how_long_is_too_long(gateway: GatewayUnderTest) -> None:
    gateway.inference.scripts["too long"] = Script(
        refuse=InvalidArgument(
            "context_length_exceeded", "2,000 tokens where 1,024 fit", field="sampling.max_tokens", limit=1024
        )
    )
    with gateway.http() as http:
        response = http.post(COMPLETIONS, json=completion(prompt="too long"))
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "2,000 tokens where 1,024 fit",
        "type": "invalid_request_error",
        "param": "max_tokens",
        "code": "context_length_exceeded",
    }


@pytest.mark.parametrize(
    ("row", "refusal", "status"),
    [
        (81, InvalidArgument("schema_too_complex", "too deep", field="sampling.json_schema"), 400),
        (83, DeadlineExceeded("constraint_timeout", "it took too long", field="sampling.json_schema"), 504),
    ],
)
def test_constraints_that_inference_refuses_are_the_response_formats(
    gateway: GatewayUnderTest, row: int, refusal: LorafleetError, status: int
) -> None:
    gateway.inference.scripts[f"row {row}"] = Script(refuse=refusal)
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    body = chat(messages=[{"role": "user", "content": f"row {row}"}], response_format=shape)
    with gateway.http() as http:
        response = http.post(CHAT, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        status,
        refusal.reason,
        "response_format",
    )


def test_row_76_a_bias_at_the_edges_is_taken(gateway: GatewayUnderTest) -> None:
    body = completion(logit_bias={"0": -100, "4294967295": 100, "7": 0.5}, seed=2**63 - 1, stop=["a"] * 4)
    with gateway.http() as http:
        assert http.post(COMPLETIONS, json=body).status_code == 200
    sampling = gateway.inference.requests[-1].sampling
    assert dict(sampling.logit_bias) == {0: -100, 4294967295: 100, 7: 0.5}
    assert (sampling.seed, list(sampling.stop)) == (2**63 - 1, ["a"] * 4)


@pytest.mark.parametrize("content", [b'{"messages":' + b"[" * 100_000, b'{"messages":' + b"[" * 2_000_000])
def test_bad_input_costs_little(gateway: GatewayUnderTest, content: bytes) -> None:
    with gateway.http() as http:
        started = time.process_time()
        for _ in range(5):
            assert http.post(CHAT, content=content, headers=JSON).status_code in (400, 413)
        # Some ten times what it takes, all threads of this process included: only a blow-up fails.
        assert (time.process_time() - started) / 5 < 0.5
