"""Limits and usage at both doors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from lorafleet.inference.v1 import generation_pb2
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.status import from_rpc_error
from services.gateway.keys import KeyLimits, Scope
from services.gateway.usage import UsageBook
from tests.support.fake_base import BASE
from tests.support.fake_inference import Script
from tests.support.gateway import GatewayUnderTest, running_gateway, wait_until


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), grpc_listen="127.0.0.1:0") as running:
        yield running


def limited(gateway: GatewayUnderTest, *, tenant: str = "default", **limits: int) -> str:
    return gateway.keys.make(tenant, tuple(Scope), limits=KeyLimits(**limits))[1]


def usage(gateway: GatewayUnderTest, key: str, **query: str) -> list[dict[str, Any]]:
    with gateway.http(key) as http:
        answer = http.get("/v1/usage", params=query)
    assert answer.status_code == 200, answer.text
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


@pytest.mark.parametrize("stream", [False, True])
def test_row_96_requests_beyond_the_limit_are_told_when(gateway: GatewayUnderTest, stream: bool) -> None:
    key = limited(gateway, requests_per_minute=2)
    body = {"model": BASE, "prompt": "hi", "stream": stream}
    with gateway.http(key) as http:
        first = http.post("/v1/completions", json=body)
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        chat = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        assert http.post("/v1/chat/completions", json=chat).status_code == 200
        refused = http.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 25 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        # Asking for lists is not limited.
        assert http.get("/v1/models").status_code == 200
    with gateway.http() as http:
        assert http.post("/v1/completions", json=body).status_code == 200


def test_tokens_are_settled_by_what_was_used(gateway: GatewayUnderTest) -> None:
    key = limited(gateway, tokens_per_minute=1000)
    body = {"model": BASE, "prompt": "hi", "max_tokens": 900}
    with gateway.http(key) as http:
        # Each reserves nearly all; what is not used is back for the next one.
        for _ in range(3):
            assert http.post("/v1/completions", json=body).status_code == 200
            time.sleep(0.1)


def test_the_grpc_door_counts_against_the_same_limit(gateway: GatewayUnderTest) -> None:
    key = limited(gateway, requests_per_minute=2)
    request = generation_pb2.GenerateRequest(model=generation_pb2.ModelRef(base=True), text="hi")
    metadata = (("authorization", f"Bearer {key}"),)
    with grpc.insecure_channel(gateway.rpc_address) as channel:
        stub = InferenceServiceStub(channel)
        list(stub.Generate(request, metadata=metadata, timeout=10))
        with gateway.http(key) as http:
            assert http.post("/v1/completions", json={"model": BASE, "prompt": "hi"}).status_code == 200
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request, metadata=metadata, timeout=10))
    assert from_rpc_error(caught.value).reason == "rate_limit_exceeded"


def test_usage_is_counted_by_key_adapter_and_tenant(gateway: GatewayUnderTest) -> None:
    gateway.adapters.publish("billing", tenant="counted")
    gateway.inference.scripts["tell me"] = Script(texts=["one", "two", "three"])
    one, two = limited(gateway, tenant="counted"), limited(gateway, tenant="counted")
    for key, model, stream in ((one, BASE, False), (one, "billing", True), (two, "billing", False)):
        with gateway.http(key) as http:
            body = {"model": model, "prompt": "tell me", "stream": stream}
            assert http.post("/v1/completions", json=body).status_code == 200
    metadata = (("authorization", f"Bearer {two}"),)
    with grpc.insecure_channel(gateway.rpc_address) as channel:
        request = generation_pb2.GenerateRequest(
            model=generation_pb2.ModelRef(adapter="billing"), text="tell me"
        )
        list(InferenceServiceStub(channel).Generate(request, metadata=metadata, timeout=10))
    wait_until(lambda: usage(gateway, one)[0]["requests"] == 4)
    by_key = {row["key"]: row["requests"] for row in usage(gateway, one, group_by="key")}
    assert by_key == {one.split("-")[1]: 2, two.split("-")[1]: 2}
    by_adapter = {row["adapter"]: row for row in usage(gateway, two, group_by="adapter")}
    assert {name: row["requests"] for name, row in by_adapter.items()} == {"base": 1, "billing": 3}
    prompt_tokens = len("tell me")
    assert by_adapter["billing"]["prompt_tokens"] == 3 * prompt_tokens
    assert usage(gateway, gateway.new_key("nobody")) == []
    # Another gateway reads what this one has written.
    gateway.app.state.gateway.usage.flush()
    store = gateway.keys._store
    day = next(iter(gateway.app.state.gateway.usage._sums))[1]
    read = UsageBook(store).read("counted", day)
    assert sum(counts.requests for counts in read.values()) == 4


def test_days_are_bounded(gateway: GatewayUnderTest) -> None:
    with gateway.http() as http:
        refused = http.get("/v1/usage", params={"start": "2020-01-01", "end": "2026-01-01"})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "start"
        assert http.get("/v1/usage", params={"start": "yesterday"}).status_code == 400
