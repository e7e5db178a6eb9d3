"""The OpenAPI document: requests made after it are never a fault of ours, and answers are as it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from pydantic import SecretStr
from schemathesis import GenerationMode
from schemathesis.checks import (
    CheckFunction,
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.specs.openapi.checks import negative_data_rejection

from services.common.store import DirectoryStore
from services.gateway.app import create_app
from services.gateway.config import GatewaySettings
from services.gateway.document.answers import ANSWERS
from services.gateway.document.document import api_routes, document
from tests.support.api_tour import Tour
from tests.support.fake_base import BASE
from tests.support.gateway import PEPPER, GatewayUnderTest, create_base, running_gateway
from tests.support.registry import FINGERPRINT, Place, base_message

CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = 6
SLOW_EXAMPLES = 150


@cache
def written() -> dict[str, Any]:
    """The document of an application that does not run."""
    settings = GatewaySettings(key_pepper=SecretStr(PEPPER), store_url="file:///nowhere")
    app = create_app(settings, DirectoryStore(Path("/nowhere")))
    assert {route.endpoint for route in api_routes(app.routes) if route.include_in_schema} == set(ANSWERS)
    return document(app.routes)


OPERATIONS = [(path, method) for path, item in written()["paths"].items() for method in item]


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayUnderTest]:
    place = Place.in_directory(redis_url, tmp_path / "registry")
    with running_gateway(tmp_path, registry=place.settings()) as running:
        create_base(running, base_message(BASE))
        running.inference.fingerprint = FINGERPRINT.digest
        yield running


def fuzz(gateway: GatewayUnderTest, mode: GenerationMode, examples: int, *, is_fixed: bool) -> None:
    """Send generated requests to every operation, the same ones in each run or others."""
    schema = schemathesis.openapi.from_dict(written())
    headers = {"authorization": f"Bearer {gateway.key}"}
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS
    for path, method in OPERATIONS:

        @given(case=schema[path][method].as_strategy(generation_mode=mode))
        @settings(
            max_examples=examples,
            derandomize=is_fixed,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def holds(case: Any) -> None:
            case.call_and_validate(base_url=gateway.url, headers=headers, checks=checks)

        try:
            holds()
        except Unsatisfiable:
            # Nothing can be wrong with a request that has no body and takes any text as its names.
            assert "requestBody" not in written()["paths"][path][method]


def test_generated_requests_are_answered_as_documented(gateway: GatewayUnderTest) -> None:
    fuzz(gateway, GenerationMode.POSITIVE, EXAMPLES, is_fixed=True)


def test_generated_nonsense_is_refused_as_documented(gateway: GatewayUnderTest) -> None:
    fuzz(gateway, GenerationMode.NEGATIVE, EXAMPLES, is_fixed=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_many_generated_requests(gateway: GatewayUnderTest, mode: GenerationMode) -> None:
    fuzz(gateway, mode, SLOW_EXAMPLES, is_fixed=False)


def test_every_operation_answers_what_the_document_says(gateway: GatewayUnderTest) -> None:
    not_seen = set(OPERATIONS)
    with gateway.http() as http:
        for path, method, response in Tour(gateway, http).all():
            content = written()["paths"][path][method]["responses"]["200"]["content"]
            kind = response.headers["content-type"].partition(";")[0]
            assert kind in content, (path, kind)
            for item, schema in answered(response, kind, content[kind]):
                check(item, schema)
            not_seen.discard((path, method))
    assert not_seen == set()


def answered(response: httpx.Response, kind: str, media: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Return the JSON values of an answer, with the schema of each."""
    if kind == "application/json":
        return [(response.json(), media["schema"])]
    if kind == "text/event-stream":
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        schema = media["itemSchema"]["properties"]["data"]["contentSchema"]
        return [(json.loads(line), schema) for line in lines if line != "[DONE]"]
    return []


def check(item: Any, schema: dict[str, Any]) -> None:
    """Check a value against a schema that refers to the document's components."""
    whole = {**schema, "components": written()["components"]}
    jsonschema.Draft202012Validator(whole).validate(item)


def test_the_document_is_served_as_it_is_written(gateway: GatewayUnderTest) -> None:
    response = httpx.get(f"{gateway.url}/openapi.json")
    assert response.json() == json.loads(json.dumps(written()))


def test_the_document_is_well_formed() -> None:
    schemathesis.openapi.from_dict(written()).validate()
    for name, schema in written()["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert "__" not in name, "two shapes have one name"


def test_a_key_is_documented_where_one_is_needed() -> None:
    without = {path for path, method in OPERATIONS if "security" not in written()["paths"][path][method]}
    assert without == {"/health", "/readyz"}
