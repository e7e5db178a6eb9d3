"""`/v1/adapters` over HTTP: files in and out, names, rollback and deletion by a real registry; comparison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.common.errors import Internal
from services.gateway.keys import Scope
from tests.support.adapter_files import config_bytes, lora_tensors, safetensors_bytes
from tests.support.fake_base import BASE
from tests.support.fake_inference import Script
from tests.support.gateway import GatewayUnderTest, create_base, running_gateway, wait_until
from tests.support.registry import BASE_NAME, FINGERPRINT, Place, base_message

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayUnderTest]:
    place = Place.in_directory(redis_url, tmp_path / "registry")
    with running_gateway(tmp_path, registry=place.settings()) as running:
        create_base(running, base_message())
        yield running


@pytest.fixture
def http(gateway: GatewayUnderTest) -> Iterator[httpx.Client]:
    with gateway.http() as client:
        yield client


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path) as running:
        yield running


def folder(seed: int) -> dict[str, bytes]:
    return {CONFIG: config_bytes(), WEIGHTS: safetensors_bytes(lora_tensors(seed=seed))}


def publish(
    http: httpx.Client, files: dict[str, bytes], name: str = "support", key: str | None = None, **fields: str
) -> httpx.Response:
    headers = {} if key is None else {"idempotency-key": key}
    form = {field: (field, content) for field, content in files.items()}
    data = {"base": BASE_NAME, **fields}
    return http.post(f"/v1/adapters/{name}/versions", files=form, data=data, headers=headers)


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_a_folder_goes_in_and_comes_out(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    made = publish(http, folder(1), description="answers tickets").json()
    assert (made["id"], made["object"], made["version"]) == ("support:1", "adapter.version", 1)
    assert made["base_fingerprint_digest"] == FINGERPRINT.digest
    assert (made["card"]["description"], made["card"]["base_model"]) == ("answers tickets", BASE_NAME)
    assert (made["format"]["max_rank"], made["format"]["target_modules"]) == (2, ["q_proj"])
    assert http.get("/v1/adapters/support/versions/1").json() == made
    for name, content in folder(1).items():
        answer = http.get(f"/v1/adapters/support/versions/1/files/{name}")
        assert answer.content == content
        assert answer.headers["content-length"] == str(len(content))
    other = http.get("/v1/adapters/support/versions/1/files/README.md")
    assert error_of(other) == (404, "file_not_found", "file")
    with gateway.http(gateway.new_key("other")) as foreign:
        for path in ("", f"/files/{CONFIG}"):
            assert foreign.get(f"/v1/adapters/support/versions/1{path}").status_code == 404


def test_publishing_again_with_a_key_is_the_same_version(http: httpx.Client) -> None:
    first = publish(http, folder(1), key="once").json()
    assert publish(http, folder(1), key="once").json()["version"] == first["version"] == 1
    assert error_of(publish(http, folder(2), key="once"))[:2] == (422, "idempotency_key_reused")
    assert publish(http, folder(2)).json()["version"] == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({WEIGHTS: None}, (400, "missing_required_parameter", WEIGHTS)),
        ({CONFIG: None}, (400, "missing_required_parameter", CONFIG)),
        ({"pytorch_model.bin": b"x"}, (400, "unsupported_parameter", "pytorch_model.bin")),
        ({CONFIG: b" " * (1024 * 1024 + 1)}, (413, "too_large", CONFIG)),
    ],
)
def test_a_folder_is_two_files(http: httpx.Client, changes: dict[str, Any], expected: object) -> None:
    files = {name: content for name, content in (folder(1) | changes).items() if content is not None}
    assert error_of(publish(http, files)) == expected
    assert http.get("/v1/adapters").json()["data"] == []


def test_what_the_registry_refuses_is_said(http: httpx.Client) -> None:
    pickled = folder(1) | {WEIGHTS: b"\x80\x04\x95" + b"x" * 64}
    assert error_of(publish(http, pickled))[0] == 400
    assert error_of(publish(http, folder(1), base="unknown")) == (404, "base_not_found", "base")
    assert error_of(publish(http, folder(1), name="Not-A-Name"))[:2] == (400, "bad_name")
    wrong_rank = folder(1) | {CONFIG: config_bytes(r=3)}
    assert error_of(publish(http, wrong_rank))[:2] == (400, "rank_mismatch")


def test_a_bad_release_is_rolled_back_and_deleted(http: httpx.Client) -> None:
    for seed in (1, 2):
        publish(http, folder(seed))
    alias = "/v1/adapters/support/aliases/prod"
    assert http.put(alias, json={"version": 1}).json()["generation"] == 1
    assert http.put(alias, json={"version": 2, "expected_generation": 1}).json()["version"] == 2
    assert http.get("/v1/adapters/support/versions/2").json()["aliases"] == ["prod"]
    assert http.post(f"{alias}/rollback", json={"expected_generation": 2}).json()["version"] == 1
    assert http.delete("/v1/adapters/support/versions/2").json() == {
        "id": "support:2", "object": "adapter.version", "deleted": True,
    }  # fmt: skip
    assert http.get("/v1/adapters/support/versions/2").status_code == 404
    assert http.get("/v1/adapters/support").json()["latest_version"]["version"] == 1
    assert http.delete(alias).json() == {"id": "support@prod", "object": "adapter.alias", "deleted": True}
    assert error_of(http.delete(alias))[:2] == (404, "alias_not_found")
    assert publish(http, folder(3)).json()["version"] == 3
    assert http.delete("/v1/adapters/support").json()["deleted"] is True
    # Its numbers are not used again, so the name is remembered.
    assert http.get("/v1/adapters/support").json()["latest_version"] is None
    assert publish(http, folder(4)).json()["version"] == 4


def test_others_cannot_delete_what_they_do_not_see(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    publish(http, folder(1))
    http.put("/v1/adapters/support/aliases/prod", json={"version": 1})
    with gateway.http(gateway.new_key("other")) as other:
        for path in ("", "/versions/1", "/aliases/prod"):
            assert other.delete(f"/v1/adapters/support{path}").status_code == 404
    assert http.get("/v1/adapters/support/aliases").json()["data"][0]["name"] == "prod"


def test_models_side_by_side(scripted: GatewayUnderTest) -> None:
    scripted.adapters.publish("support")
    scripted.adapters.publish("support")
    scripted.adapters.point("support", "prod", 1)
    scripted.inference.scripts["hi"] = Script(logprobs=(-0.25,))
    names = [BASE, "support", "support:2", "support@prod", f"{BASE}:support", f"ft:{BASE}:default:support:v1"]
    with scripted.http() as http:
        answer = http.post("/v1/adapters/compare", json={"models": names, "prompt": "hi", "max_tokens": 9})
        chat = {"models": [BASE], "messages": [{"role": "user", "content": "hi"}]}
        spoken = http.post("/v1/adapters/compare", json=chat).json()["data"]
    data = answer.json()["data"]
    assert [entry["model"] for entry in data] == names
    newest, first = "support:2", "support:1"
    assert [entry["version"] for entry in data] == [None, newest, newest, first, newest, first]
    assert {entry["text"] for entry in data + spoken} == {"Hello world"}
    assert {entry["mean_logprob"] for entry in data + spoken} == {-0.25}
    assert data[0]["usage"]["completion_tokens"] == 2
    sampling = scripted.inference.requests[0].sampling
    assert (sampling.temperature, sampling.HasField("temperature"), sampling.max_tokens) == (0, True, 9)


def test_a_comparison_is_whole_or_not_at_all(scripted: GatewayUnderTest) -> None:
    scripted.inference.scripts["fails"] = Script(fail=Internal("worker_lost", "it broke"))
    with scripted.http() as http:
        unknown = http.post("/v1/adapters/compare", json={"models": [BASE, "unknown"], "prompt": "hi"})
        assert error_of(unknown) == (404, "model_not_found", "model")
        assert scripted.inference.requests == []
        failed = http.post("/v1/adapters/compare", json={"models": [BASE, BASE], "prompt": "fails"})
        assert failed.status_code == 500
        for body in (
            {"models": [BASE]},
            {"models": [], "prompt": "a"},
            {"models": [BASE] * 17, "prompt": "a"},
        ):
            assert http.post("/v1/adapters/compare", json=body).status_code == 400
    wait_until(lambda: scripted.inference.ended == len(scripted.inference.requests))
    with scripted.http(scripted.new_key("default", Scope.ADAPTERS)) as http:
        refused = http.post("/v1/adapters/compare", json={"models": [BASE], "prompt": "hi"})
        assert error_of(refused)[:2] == (403, "permission_denied")
