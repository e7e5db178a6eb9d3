"""Embeddings over HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import NotFoundError, OpenAI

from tests.support.fake_base import BASE
from tests.support.gateway import GatewayUnderTest, running_gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), key_cache_seconds=0) as running:
        yield running


@pytest.fixture
def client(gateway: GatewayUnderTest) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key) as client:
        yield client


def test_the_stock_client_gets_a_vector_for_each_text(gateway: GatewayUnderTest, client: OpenAI) -> None:
    """Without `encoding_format` the client asks for base64 and takes it apart by itself."""
    gateway.adapters.publish("billing")
    for model in (BASE, "billing"):
        made = client.embeddings.create(model=model, input=["a", "four"])
        assert [item.embedding for item in made.data] == [[1.0, 0.5], [4.0, 0.5]]
        assert [item.index for item in made.data] == [0, 1]
        assert (made.model, made.usage.prompt_tokens, made.usage.total_tokens) == (model, 5, 5)
    plain = client.embeddings.create(model=BASE, input="abc", encoding_format="float")
    assert plain.data[0].embedding == [3.0, 0.5]
    with pytest.raises(NotFoundError):
        client.embeddings.create(model="absent", input="a")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input[1]", "invalid_value"),
        ({"input": ["a"] * 257}, "input", "invalid_value"),
        ({"input": [1, 2]}, "input[0]", "invalid_value"),
        ({"input": "a", "dimensions": 8}, "dimensions", "unsupported_parameter"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({}, "input", "missing_required_parameter"),
    ],
)
def test_bad_requests_are_refused_by_name(
    gateway: GatewayUnderTest, fields: dict[str, object], param: str, code: str
) -> None:
    with gateway.http() as http:
        refused = http.post("/v1/embeddings", json={"model": BASE, **fields})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
