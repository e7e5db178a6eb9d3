"""Keys over HTTP: who may make what, and how fast a revoked key is useless."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from typer.testing import CliRunner

from lorafleet.cli.app import app
from lorafleet.inference.v1 import generation_pb2
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.errors import Unauthenticated, Unavailable
from services.common.status import from_rpc_error
from services.common.store import DirectoryStore
from services.gateway import keys as keys_module
from services.gateway.keys import KeyLimits, KeyRing, Scope
from services.trainer.parity import CANDIDATE_TENANT
from tests.support.fake_base import BASE
from tests.support.fake_inference import Script
from tests.support.gateway import PEPPER, GatewayUnderTest, running_gateway, sse_objects, wait_until


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), grpc_listen="127.0.0.1:0") as running:
        yield running


def test_a_key_is_made_shown_once_listed_and_revoked(gateway: GatewayUnderTest) -> None:
    with gateway.http() as http:
        wanted = {"name": "ci", "scopes": ["inference"], "expires_in_days": 2, "requests_per_minute": 5}
        made = http.post("/v1/keys", json=wanted).json()
        assert made["scopes"] == ["inference"]
        assert made["expires_at"] - made["created_at"] == 2 * 24 * 3600
        listed = http.get("/v1/keys").json()["data"]
        (shown,) = (key for key in listed if key["id"] == made["id"])
        assert shown == {name: value for name, value in made.items() if name != "key"}
        assert made["key"] not in http.get("/v1/keys").text
        with gateway.http(made["key"]) as own:
            assert own.get("/v1/models").status_code == 200
            assert own.get("/v1/keys").status_code == 403
        assert http.delete(f"/v1/keys/{made['id']}").json()["deleted"] is True
        assert http.delete(f"/v1/keys/{made['id']}").status_code == 404
        assert made["id"] not in {key["id"] for key in http.get("/v1/keys").json()["data"]}
    with gateway.http(made["key"]) as own:
        assert own.get("/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"scopes": ["inference", "operate"]}, "scopes"),
        ({"scopes": ["everything"]}, "scopes"),
        ({"tenant": "other"}, "tenant"),
        ({"requests_per_minute": 11, "tokens_per_minute": 1}, "requests_per_minute"),
        ({"tokens_per_minute": 1001}, "tokens_per_minute"),
    ],
)
def test_no_key_makes_one_with_more_rights(
    gateway: GatewayUnderTest, body: dict[str, object], field: str
) -> None:
    _, small = gateway.keys.make("default", [Scope.KEYS, Scope.INFERENCE], limits=KeyLimits(10, 1000))
    with gateway.http(small) as http:
        refused = http.post("/v1/keys", json=body)
        assert refused.status_code == 403
        assert refused.json()["error"]["param"] == field
        same = http.post("/v1/keys", json={"requests_per_minute": 9}).json()
        assert same["scopes"] == ["inference", "keys"]
        assert (same["requests_per_minute"], same["tokens_per_minute"]) == (9, 1000)


def test_an_operator_makes_keys_of_other_tenants_and_sees_none_of_them(gateway: GatewayUnderTest) -> None:
    with gateway.http() as http:
        made = http.post("/v1/keys", json={"tenant": "elsewhere", "scopes": ["keys"]}).json()
        assert made["tenant"] == "elsewhere"
        assert made["id"] not in {key["id"] for key in http.get("/v1/keys").json()["data"]}
        assert http.delete(f"/v1/keys/{made['id']}").status_code == 404
        for tenant in ("Bad Name", CANDIDATE_TENANT):
            assert http.post("/v1/keys", json={"tenant": tenant}).json()["error"]["code"] == "bad_tenant"
    with gateway.http(made["key"]) as http:
        assert [key["id"] for key in http.get("/v1/keys").json()["data"]] == [made["id"]]


def test_a_revoked_key_is_useless_within_a_second_everywhere(gateway: GatewayUnderTest) -> None:
    """The other replica's way of noticing: its cache ends, and the store says no."""
    key = gateway.new_key()
    with gateway.http(key) as http:
        assert http.get("/v1/models").status_code == 200
        gateway.keys.revoke(key.split("-")[1])
        revoked_at = time.monotonic()
        while http.get("/v1/models").status_code == 200:
            assert time.monotonic() - revoked_at < 1.5
            time.sleep(0.05)


def test_row_94_a_stream_ends_soon_after_its_key(gateway: GatewayUnderTest) -> None:
    gateway.inference.scripts["go on"] = Script(texts=["a"], hang=True)
    key, before = gateway.new_key(), gateway.inference.cancelled
    body = {"model": BASE, "prompt": "go on", "stream": True}
    with gateway.http(key) as http, http.stream("POST", "/v1/completions", json=body) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        gateway.keys.revoke(key.split("-")[1])
        # The client waits for the next piece for ten seconds at most.
        text += "".join(pieces)
    items, is_done = sse_objects(text)
    assert not is_done
    assert items[-1]["error"]["code"] == "key_revoked"
    assert items[0]["choices"][0]["text"] == "a"
    wait_until(lambda: gateway.inference.cancelled == before + 1)


def test_row_94_a_grpc_stream_ends_soon_after_its_key(gateway: GatewayUnderTest) -> None:
    gateway.inference.scripts["go on"] = Script(texts=["a"], hang=True)
    key = gateway.new_key()
    request = generation_pb2.GenerateRequest(model=generation_pb2.ModelRef(base=True), text="go on")
    with grpc.insecure_channel(gateway.rpc_address) as channel:
        stub = InferenceServiceStub(channel)
        stream = stub.Generate(request, metadata=(("authorization", f"Bearer {key}"),), timeout=20)
        next(stream)
        gateway.keys.revoke(key.split("-")[1])
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
    assert from_rpc_error(caught.value).reason == "key_revoked"


class FailingStore(DirectoryStore):
    """A store that can stop answering."""

    is_down = False

    def get(self, key: str) -> bytes:
        if self.is_down:
            raise Unavailable("store_unavailable", "the store does not answer")
        return super().get(key)


async def test_row_97_known_keys_outlive_the_store_for_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FailingStore(tmp_path / "store")
    ring = KeyRing(store, PEPPER, cache_seconds=0)
    known, new = ring.create("acme"), ring.create("acme")
    assert (await ring.authenticate(known)).tenant == "acme"
    store.is_down = True
    assert (await ring.authenticate(known)).tenant == "acme"
    with pytest.raises(Unavailable):
        await ring.authenticate(new)
    with pytest.raises(Unauthenticated):
        await ring.authenticate(known[:-1] + ("A" if known[-1] != "A" else "B"))
    monkeypatch.setattr(keys_module, "STALE_SECONDS", 0.0)
    with pytest.raises(Unavailable):
        await ring.authenticate(known)
    store.is_down = False
    assert (await ring.authenticate(new)).tenant == "acme"


def test_keys_from_the_command_line(gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_URL", f"{gateway.url}/v1")
    monkeypatch.setenv("LORAFLEET_API_KEY", gateway.key)
    made = CliRunner().invoke(app, ["keys", "create", "laptop", "--scopes", "inference", "--days", "1"])
    assert made.exit_code == 0
    key = made.stdout.strip()
    assert (
        httpx.get(f"{gateway.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    )
    key_id = key.split("-")[1]
    assert key_id in CliRunner().invoke(app, ["keys", "list"]).stdout
    assert CliRunner().invoke(app, ["keys", "revoke", key_id]).exit_code == 0
    assert key_id not in CliRunner().invoke(app, ["keys", "list"]).stdout
    gone = CliRunner().invoke(app, ["keys", "revoke", key_id, "--json"])
    assert gone.exit_code == 1
    assert "key_not_found" in gone.stdout
