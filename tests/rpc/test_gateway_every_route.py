"""Every route of the gateway, taken from the application itself: no key, bad keys, scopes, other tenants.

A new route is in here by itself; one that takes a resource of a new kind fails until `Own` has one.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from lorafleet.registry.v1.file_pb2 import File
from lorafleet.trainer.v1.job_pb2 import Checkpoint, JobState
from services.common.store import DirectoryStore
from services.gateway.app import create_app
from services.gateway.auth import is_admission, scope_of
from services.gateway.config import GatewaySettings
from services.gateway.document.document import dependencies_of
from services.gateway.keys import Scope
from tests.support.api_tour import FOLDER
from tests.support.fake_base import BASE
from tests.support.gateway import PEPPER, GatewayUnderTest, create_base, running_gateway
from tests.support.registry import FINGERPRINT, Place, base_message

OPEN = {"/health", "/readyz", "/openapi.json"}
CHAT = {"model": "mine", "messages": [{"role": "user", "content": "hi"}]}
# Bodies of requests that name what is not the caller's, where a body must be read first.
BODIES: dict[str, Any] = {
    "/v1/completions": {"model": "mine", "prompt": "hi"},
    "/v1/chat/completions": CHAT,
    "/v1/embeddings": {"model": "mine", "input": "hi"},
    "/generate": {"inputs": "hi", "parameters": {"adapter_id": "mine"}},
    "/generate_stream": {"inputs": "hi", "parameters": {"adapter_id": "mine"}},
    "/": {"inputs": "hi", "parameters": {"adapter_id": "mine"}},
    "/v1/adapters/compare": {"models": ["mine"], "prompt": "hi"},
    "/v1/adapters/{name}/aliases/{alias}": {"version": 1},
    "/v1/fine_tuning/jobs": {"model": BASE, "training_file": "file-mine"},
    "/v1/uploads/{upload_id}/complete": {"part_ids": ["part-x"]},
}
# What makes something of the caller's own, or tells of nobody's.
NOT_ABOUT_OTHERS = {
    "/tokenize",
    "/info",
    "/v1/files",
    "/v1/uploads",
    "/v1/keys",
    "/v1/adapters/{name}/versions",
}


@dataclass(frozen=True)
class Operation:
    """One method of one route, and the scope that it asks for."""

    method: str
    path: str
    needs_key: bool
    scope: Scope | None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@cache
def operations() -> tuple[Operation, ...]:
    """Every operation of an application that does not run."""
    made = GatewaySettings(key_pepper=SecretStr(PEPPER), store_url="file:///nowhere")
    app = create_app(made, DirectoryStore(Path("/nowhere")))
    found = []
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        assert isinstance(route, APIRoute), f"{route} is no route that can ask for a key"
        admissions = [call for call in dependencies_of(route) if is_admission(call)]
        scopes = {scope_of(admission) for admission in admissions}
        assert len(scopes) <= 1
        scope, needs_key = next(iter(scopes), None), bool(admissions)
        methods = sorted(route.methods or ())
        found += [Operation(method, route.path_format, needs_key, scope) for method in methods]
    return tuple(found)


KEYED = [operation for operation in operations() if operation.needs_key]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, valkey_server: Any) -> Iterator[GatewayUnderTest]:
    folder = tmp_path_factory.mktemp("gateway")
    place = Place.in_directory(valkey_server.url, folder / "registry")
    with running_gateway(folder, registry=place.settings()) as running:
        create_base(running, base_message(BASE))
        running.inference.fingerprint = FINGERPRINT.digest
        yield running


@pytest.fixture(scope="module")
def own(gateway: GatewayUnderTest) -> dict[str, str]:
    """One resource of each kind that belongs to the tenant `default`, by the names of path parameters."""
    with gateway.http() as http:
        form = {name: (name, content) for name, content in FOLDER.items()}
        assert http.post("/v1/adapters/mine/versions", files=form).status_code == 200
        assert http.put("/v1/adapters/mine/aliases/prod", json={"version": 1}).status_code == 200
        rows = {"file": ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n')}
        file = http.post("/v1/files", files=rows, data={"purpose": "fine-tune"}).json()
        new = {"filename": "a", "purpose": "fine-tune", "bytes": 9, "mime_type": ""}
        upload = http.post("/v1/uploads", json=new).json()
        gateway.files.stored["default", "file-mine"] = File(), b""
        job = http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": "file-mine"}).json()
        gateway.trainer.checkpoints[job["id"]].append(Checkpoint(id="ftckpt-mine", job_id=job["id"]))
        key = http.post("/v1/keys", json={}).json()
    gateway.adapters.publish("mine")
    return {
        "name": "mine", "version": "1", "alias": "prod", "file": "adapter_config.json", "model": "mine",
        "file_id": file["id"], "upload_id": upload["id"], "job_id": job["id"], "checkpoint_id": "ftckpt-mine",
        "key_id": key["id"],
    }  # fmt: skip


def call(http: httpx.Client, operation: Operation, names: dict[str, str]) -> httpx.Response:
    body = BODIES.get(operation.path, {})
    path = operation.path.format(**names)
    if operation.path.endswith("/parts"):
        return http.request(operation.method, path, files={"data": b"x"})
    has_body = operation.method in ("POST", "PUT", "PATCH")
    return http.request(operation.method, path, **({"json": body} if has_body else {}))


def code_of(response: httpx.Response) -> str:
    error = response.json()["error"]
    return str(error["code"] if isinstance(error, dict) else response.json()["error_type"])


def test_only_these_routes_need_no_key() -> None:
    assert {operation.path for operation in operations() if not operation.needs_key} == OPEN
    assert len(KEYED) > 40


@pytest.mark.parametrize("operation", KEYED, ids=str)
def test_no_key_no_answer(gateway: GatewayUnderTest, own: dict[str, str], operation: Operation) -> None:
    with httpx.Client(base_url=gateway.url) as http:
        bodies = set()
        for headers in (
            {},
            {"authorization": ""},
            {"authorization": f"Basic {gateway.key}"},
            {"authorization": gateway.key},
            {"authorization": f"Bearer {gateway.key}x"},
            {"x-api-key": gateway.key},
        ):
            http.headers = httpx.Headers(headers)
            response = call(http, operation, own)
            assert (response.status_code, code_of(response)) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
            bodies.add(response.text)
    assert len(bodies) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    operation=st.sampled_from(KEYED),
    key=st.one_of(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=80),
        st.from_regex(r"lf-[a-z2-7]{16}-[A-Za-z0-9_-]{43}", fullmatch=True),
    ),
)
def test_a_bad_key_is_as_good_as_none(
    gateway: GatewayUnderTest, own: dict[str, str], operation: Operation, key: str
) -> None:
    with gateway.http(key or "x") as http:
        response = call(http, operation, own)
    assert (response.status_code, code_of(response)) == (401, "invalid_api_key")


@pytest.mark.parametrize("operation", [one for one in KEYED if one.scope], ids=str)
def test_a_key_without_the_scope_is_refused(
    gateway: GatewayUnderTest, own: dict[str, str], operation: Operation
) -> None:
    scopes = set(Scope) - {operation.scope}
    with gateway.http(gateway.new_key("default", *(scope for scope in scopes if scope))) as http:
        response = call(http, operation, own)
    assert (response.status_code, code_of(response)) == (403, "permission_denied")


@pytest.mark.parametrize("operation", KEYED, ids=str)
def test_what_is_anothers_is_not_there(
    gateway: GatewayUnderTest, own: dict[str, str], operation: Operation
) -> None:
    with gateway.http(gateway.new_key("other")) as http:
        response = call(http, operation, own)
    names_something = "{" in operation.path or operation.path in BODIES
    if names_something and operation.path not in NOT_ABOUT_OTHERS:
        is_not_found = response.status_code == 404
        is_list = operation.method == "GET" and operation.path == "/v1/fine_tuning/jobs"
        assert is_not_found or is_list, response.text
    for kind in ("file_id", "upload_id", "job_id", "key_id", "checkpoint_id"):
        if f"{{{kind}}}" not in operation.path:
            assert own[kind] not in response.text
    with gateway.http() as http:
        assert http.get("/v1/adapters/mine/versions/1").json()["aliases"] == ["prod"]
        for path in (f"/v1/files/{own['file_id']}", f"/v1/fine_tuning/jobs/{own['job_id']}"):
            assert http.get(path).status_code == 200
        assert own["key_id"] in http.get("/v1/keys").text
    assert gateway.trainer.jobs[own["job_id"]].state == JobState.JOB_STATE_QUEUED


@pytest.mark.parametrize("operation", KEYED, ids=str)
def test_row_88_no_spelling_of_a_path_goes_round_the_key(
    gateway: GatewayUnderTest, own: dict[str, str], operation: Operation
) -> None:
    path = operation.path.format(**own)
    first = path[1:2]
    spellings = [
        f"/{path}", f"{path}/", path.upper(), f"/health/..{path}", f"/health/%2e%2e{path}", f"{path};a=b",
        f"{path}?a=/health", f"{path}%00", f"/%{ord(first):02x}{path[2:]}" if first else "/%2f",
        f"http://elsewhere{path}", f"{path}#/health", f"/.{path}",
    ]  # fmt: skip
    for spelling in spellings:
        for host in ("localhost", "x/health?a=", "[::1]"):
            status = raw(gateway, f"{operation.method} {spelling} HTTP/1.1\r\nhost: {host}\r\n")
            assert status in (400, 401, 404, 405), (spelling, host)


def raw(gateway: GatewayUnderTest, head: str) -> int:
    """Send a request as it is written and return the status of the answer."""
    address = urlsplit(gateway.url)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port or 0), timeout=10) as connection:
        connection.sendall(f"{head}content-length: 0\r\nconnection: close\r\n\r\n".encode())
        answer = b""
        while b"\r\n" not in answer and (received := connection.recv(4096)):
            answer += received
    return int(answer.split()[1])
