"""Keys, request ids, and answers for routes that are not there."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import httpx
import pytest

from services.common.store import DirectoryStore
from services.gateway.keys import KeyRing, Scope
from tests.support.fake_base import BASE
from tests.support.gateway import PEPPER, GatewayUnderTest, running_gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), key_cache_seconds=0) as running:
        yield running


def test_row_93_no_bad_key_is_told_apart(
    gateway: GatewayUnderTest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    revoked = gateway.new_key()
    gateway.keys.revoke(revoked.split("-")[1])
    expired = gateway.new_key(lifetime_seconds=0)
    foreign = KeyRing(DirectoryStore(tmp_path_factory.mktemp("other")), PEPPER, 0).create("default")
    bodies = set()
    for key in (revoked, expired, foreign, gateway.key[:-1], "lf-", "x" * 5000):
        with gateway.http(key) as http:
            response = http.get("/v1/models")
        assert response.status_code == 401
        bodies.add(response.text)
    assert len(bodies) == 1


def test_two_keys_are_no_key(gateway: GatewayUnderTest) -> None:
    pair = [("authorization", f"Bearer {gateway.key}")] * 2
    assert httpx.get(gateway.url + "/v1/models", headers=pair).status_code == 401


def test_row_95_a_key_does_what_its_scopes_say(gateway: GatewayUnderTest) -> None:
    with gateway.http(gateway.new_key("default", Scope.FILES)) as http:
        assert http.get("/v1/files").status_code == 200
        assert http.get("/v1/models").status_code == 200
        for path in ("/v1/fine_tuning/jobs", "/v1/adapters"):
            response = http.get(path)
            assert response.status_code == 403
            assert response.json()["error"]["code"] == "permission_denied"
        body = {"model": BASE, "prompt": "hi"}
        assert http.post("/v1/completions", json=body).status_code == 403


@pytest.mark.parametrize(
    "path", ["//v1/models", "/V1/models", "/v1/models/", "/v1/%2e%2e/v1/modelz", "/docs", "/redoc"]
)
def test_row_88_other_spellings_are_no_way_in(gateway: GatewayUnderTest, path: str) -> None:
    response = httpx.get(gateway.url + path)
    assert response.status_code in (401, 404)
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_unknown_routes_and_methods(gateway: GatewayUnderTest) -> None:
    with gateway.http() as http:
        missing, wrong = http.get("/v1/nothing"), http.delete("/v1/models")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "route_not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/v1/models?limit=1", "limit"),
        ("/v1/files?purposes=fine-tune", "purposes"),
        ("/v1/files?metadata[a]=b", "metadata[a]"),
        ("/v1/fine_tuning/jobs?limit=3&limits=3", "limits"),
        ("/v1/fine_tuning/jobs?limit[a]=3", "limit[a]"),
    ],
)
def test_query_parameters_that_are_not_known_are_refused_by_name(
    gateway: GatewayUnderTest, path: str, named: str
) -> None:
    with gateway.http() as http:
        response = http.get(path)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", named)


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("my-id_1.2", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("", False)],
)
def test_row_92_request_ids(gateway: GatewayUnderTest, given: str, is_kept: bool) -> None:
    response = httpx.get(gateway.url + "/v1/models", headers={"x-request-id": given})
    answered = response.headers["x-request-id"]
    assert (answered == given) is is_kept
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answered)


def test_row_91_the_access_log_holds_no_key_and_no_text(
    gateway: GatewayUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    hostile = "secret text \r\n\x1b[31m" + "u" * 10_000
    with caplog.at_level(logging.DEBUG), gateway.http() as http:
        body = {"model": BASE, "prompt": hostile, "user": hostile[:1000]}
        assert http.post("/v1/completions", json=body).status_code == 200
        assert http.get("/v1/models/" + "m" * 5000, params={"token": "hidden"}).status_code == 400
    lines = [record for record in caplog.records if record.name == "lorafleet.access"]
    requests = [record for record in lines if record.message == "request ended"]
    assert [record.__dict__["status"] for record in requests] == [200, 400]
    assert [record.__dict__["tenant"] for record in requests] == ["default", "default"]
    text = repr([record.__dict__ for record in lines])
    assert gateway.key not in text
    assert "secret text" not in text
    assert "hidden" not in text
    assert all(len(record.__dict__["path"]) <= 200 for record in requests)


def test_health_needs_no_key_and_readiness_asks_the_services(gateway: GatewayUnderTest) -> None:
    assert httpx.get(gateway.url + "/health").json() == {"status": "ok"}
    serving = {"registry": "serving", "trainer": "serving", "inference": "serving"}
    ready = httpx.get(gateway.url + "/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "services": serving})
