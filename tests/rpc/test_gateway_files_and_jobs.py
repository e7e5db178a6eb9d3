"""Files, fine-tuning jobs and adapters over HTTP."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorafleet.inference.v1.inference_service_pb2 import ResidentAdapter, Tier
from lorafleet.trainer.v1.job_pb2 import Checkpoint, Progress
from services.common.errors import Unimplemented
from tests.support.fake_base import BASE, BASE_CREATED
from tests.support.fake_inference import Script
from tests.support.gateway import GatewayUnderTest, running_gateway, sse_objects, wait_until

ROWS = b'{"prompt": "a\\n", "completion": "b"}\n' * 100
ERROR_KEYS = {"message", "type", "param", "code"}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path, max_file_bytes=1_000_000, max_concurrent_uploads=2) as running:
        yield running


@pytest.fixture
def http(gateway: GatewayUnderTest) -> Iterator[httpx.Client]:
    with gateway.http() as client:
        yield client


def upload(http: httpx.Client, content: bytes = ROWS, **fields: str) -> httpx.Response:
    return http.post(
        "/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": "fine-tune", **fields}
    )


def error_of(response: httpx.Response) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    assert error.keys() == ERROR_KEYS
    return response.status_code, error["code"], error["param"]


def new_job(http: httpx.Client, **changes: Any) -> dict[str, Any]:
    body = {"model": BASE, "training_file": upload(http).json()["id"], **changes}
    response = http.post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code == 200, response.text
    made: dict[str, Any] = response.json()
    return made


def test_a_file_goes_up_and_comes_down(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    content = bytes(range(256)) * 3000
    made = upload(http, content).json()
    assert {**made, "id": "", "created_at": 0} == {
        "id": "",
        "object": "file",
        "bytes": len(content),
        "created_at": 0,
        "expires_at": None,
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
    }
    assert gateway.files.largest_message_bytes < 300_000
    assert http.get(f"/v1/files/{made['id']}").json() == made
    down = http.get(f"/v1/files/{made['id']}/content")
    assert down.content == content
    assert http.delete(f"/v1/files/{made['id']}").json() == {
        "id": made["id"],
        "object": "file",
        "deleted": True,
    }
    assert error_of(http.get(f"/v1/files/{made['id']}")) == (404, "file_not_found", None)
    assert error_of(http.get(f"/v1/files/{made['id']}/content")) == (404, "file_not_found", None)


def test_the_purpose_may_come_after_the_file(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    body = (
        b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}\r\n'
        b'--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--XX--\r\n'
    )
    headers = {"content-type": "multipart/form-data; boundary=XX"}
    assert http.post("/v1/files", content=body, headers=headers).json()["bytes"] == 2


@pytest.mark.parametrize(
    ("files", "data", "expected"),
    [
        ({"file": ("a", b"x")}, {}, (400, "missing_required_parameter", "purpose")),
        ({"file": ("a", b"x")}, {"purpose": "vision"}, (400, "invalid_value", "purpose")),
        ({"file": ("a", b"x")}, {"purpose": "fine-tune-results"}, (400, "invalid_value", "purpose")),
        ({"other": ("a", b"x")}, {"purpose": "fine-tune"}, (400, "unsupported_parameter", "other")),
        (
            {"file": ("a", b"x")},
            {"purpose": "fine-tune", "expires_after[seconds]": "1"},
            (400, "unsupported_parameter", "expires_after[seconds]"),
        ),
        ({"file": ("a", b"")}, {"purpose": "fine-tune"}, (400, "empty_file", "file")),
        ({"file": ("a", b"x" * 1_000_001)}, {"purpose": "fine-tune"}, (413, "too_large", "file")),
    ],
)
def test_bad_uploads_leave_nothing(
    gateway: GatewayUnderTest,
    http: httpx.Client,
    files: dict[str, tuple[str, bytes]],
    data: dict[str, str],
    expected: tuple[int, str, str],
) -> None:
    assert error_of(http.post("/v1/files", files=files, data=data)) == expected
    assert not gateway.files.stored


def test_an_upload_is_a_form(http: httpx.Client) -> None:
    assert error_of(http.post("/v1/files", json={}))[:2] == (415, "unsupported_media_type")
    cut = b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
    headers = {"content-type": "multipart/form-data; boundary=XX"}
    assert error_of(http.post("/v1/files", content=cut, headers=headers))[:2] == (400, "bad_form")


@contextmanager
def half_sent_upload(gateway: GatewayUnderTest) -> Iterator[None]:
    """Begin an upload that the gateway has let in, and cut its connection at the end."""
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gateway.key}\r\n"
            "content-type: multipart/form-data; boundary=XX\r\ncontent-length: 100000\r\n"
            "expect: 100-continue\r\n\r\n".encode()
        )
        # Sent when the body is first asked for.
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc')
        yield


def test_uploads_have_bounded_room_and_a_cut_one_gives_its_own_back(
    gateway: GatewayUnderTest, http: httpx.Client
) -> None:
    with half_sent_upload(gateway), half_sent_upload(gateway):
        assert error_of(upload(http))[:2] == (429, "too_many_uploads")
    wait_until(lambda: upload(http).status_code == 200)
    assert len(gateway.files.stored) == 1


def test_lists_of_files(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    ids = [upload(http).json()["id"] for _ in range(5)]

    def listed(**params: Any) -> tuple[list[str], bool]:
        page = http.get("/v1/files", params=params).json()
        assert page["object"] == "list"
        assert page["first_id"] == (page["data"][0]["id"] if page["data"] else None)
        return [file["id"] for file in page["data"]], page["has_more"]

    assert listed() == (ids[::-1], False)
    assert listed(limit=2) == (ids[:2:-1], True)
    assert listed(limit=2, after=ids[3]) == ([ids[2], ids[1]], True)
    assert listed(limit=2, after=ids[1]) == ([ids[0]], False)
    assert listed(order="asc", limit=3) == (ids[:3], True)
    assert listed(purpose="fine-tune-results") == ([], False)
    for params in ({"limit": 0}, {"limit": 10**9}, {"order": "up"}, {"purpose": "x"}, {"after": "file-x"}):
        status, code, param = error_of(http.get("/v1/files", params=params))
        assert (status, code, param) == (400, "invalid_value", next(iter(params)))


def test_a_job_from_start_to_end(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    made = new_job(
        http,
        suffix="support",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2}, "lorafleet": {"rank": 8}},
        },
    )
    assert made["status"] == "queued"
    assert made["method"]["supervised"]["lorafleet"] == {"rank": 8}
    assert made["hyperparameters"] == {
        "batch_size": "auto",
        "learning_rate_multiplier": "auto",
        "n_epochs": 2,
    }
    gateway.trainer.add_event(made["id"], "Step 1/2", metrics=Progress(step=1, total_steps=2, loss=0.5))
    gateway.trainer.succeed(made["id"], gateway.adapters.publish("support"))
    job = http.get(f"/v1/fine_tuning/jobs/{made['id']}").json()
    assert job["status"] == "succeeded"
    assert job["fine_tuned_model"] == f"ft:{BASE}:default:support:v1"
    assert job["result_files"] == ["file-results"]
    assert job["trained_tokens"] == 1234
    assert job["lorafleet"]["evaluation"][0]["adapter_value"] == 0.9
    events = http.get(f"/v1/fine_tuning/jobs/{made['id']}/events").json()
    assert [event["type"] for event in events["data"]] == ["message", "metrics", "message"]
    assert events["data"][1]["data"]["train_loss"] == 0.5
    answer = http.post("/v1/completions", json={"model": job["fine_tuned_model"], "prompt": "hi"})
    assert answer.json()["choices"][0]["text"] == "Hello world"
    assert error_of(http.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel"))[:2] == (400, "already_finished")


def test_events_are_followed_without_gap_or_repeat(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    made = new_job(http)
    path = f"/v1/fine_tuning/jobs/{made['id']}/events"

    def train() -> None:
        for step in range(5):
            gateway.trainer.add_event(made["id"], f"Step {step}", metrics=Progress(step=step))
        gateway.trainer.succeed(made["id"], gateway.adapters.publish("followed"))

    threading.Timer(0.1, gateway.loop.call_soon_threadsafe, [train]).start()
    objects, is_done = sse_objects(http.get(path, params={"stream": "true"}).text)
    assert is_done
    assert [event["message"] for event in objects] == [
        "Created", *(f"Step {step}" for step in range(5)), "The job has succeeded",
    ]  # fmt: skip
    later, _ = sse_objects(http.get(path, params={"stream": "true", "after": objects[3]["id"]}).text)
    assert later == objects[4:]
    paged = http.get(path, params={"limit": 2, "after": objects[4]["id"]}).json()
    assert paged["data"] == objects[3:1:-1]
    assert paged["has_more"] is True


def test_a_follower_that_leaves_ends_the_watch(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    path = f"/v1/fine_tuning/jobs/{new_job(http)['id']}/events?stream=true"
    with gateway.http() as leaving, leaving.stream("GET", path) as response:
        assert next(response.iter_lines()).startswith("data: ")
        assert gateway.trainer.watching == 1
    wait_until(lambda: gateway.trainer.watching == 0)


def test_lists_of_jobs(http: httpx.Client) -> None:
    ids = [new_job(http, metadata={"n": str(number % 2)})["id"] for number in range(4)]

    def listed(**params: Any) -> tuple[list[str], bool]:
        page = http.get("/v1/fine_tuning/jobs", params=params).json()
        return [job["id"] for job in page["data"]], page["has_more"]

    assert listed() == (ids[::-1], False)
    assert listed(limit=3) == (ids[:0:-1], True)
    assert listed(after=ids[2]) == ([ids[1], ids[0]], False)
    assert listed(**{"metadata[n]": "1"}) == ([ids[3], ids[1]], False)
    refusal = http.get("/v1/fine_tuning/jobs", params={"metadata": "null"})
    assert error_of(refusal) == (400, "unsupported_parameter", "metadata")


def test_row_57_one_key_one_job(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    body = {"model": BASE, "training_file": upload(http).json()["id"], "seed": 1}
    headers = {"idempotency-key": "order-66"}
    first, again = (http.post("/v1/fine_tuning/jobs", json=body, headers=headers).json() for _ in range(2))
    assert first["id"] == again["id"]
    other = http.post("/v1/fine_tuning/jobs", json={**body, "seed": 2}, headers=headers)
    assert error_of(other)[:2] == (422, "idempotency_key_reused")
    assert len(gateway.trainer.jobs) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "unknown"}, (404, "model_not_found", "model")),
        ({"model": f"ft:{BASE}:default:support:v1"}, (404, "model_not_found", "model")),
        ({"training_file": "file-none"}, (404, "file_not_found", "training_file")),
        (
            {"method": {"type": "supervised", "supervised": {"lorafleet": {"rank": 4096}}}},
            (400, "bad_hyperparameter", "method.supervised.lorafleet.rank"),
        ),
        ({"method": {"type": "dpo"}}, (400, "unsupported_parameter", "method.type")),
        ({"rank": 8}, (400, "unsupported_parameter", "rank")),
    ],
)
def test_bad_jobs(http: httpx.Client, change: dict[str, Any], expected: tuple[int, str, str]) -> None:
    body = {"model": BASE, "training_file": upload(http).json()["id"], **change}
    assert error_of(http.post("/v1/fine_tuning/jobs", json=body)) == expected


def test_what_a_service_does_not_offer_is_not_asked_for_again(
    gateway: GatewayUnderTest, http: httpx.Client
) -> None:
    gateway.inference.scripts["hi"] = Script(refuse=Unimplemented("not_implemented", "not here"))
    answer = http.post("/v1/completions", json={"model": BASE, "prompt": "hi"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (501, "false")


def test_pausing_resuming_and_cancelling(http: httpx.Client) -> None:
    made = new_job(http)
    path = f"/v1/fine_tuning/jobs/{made['id']}"
    assert http.post(f"{path}/pause").json()["status"] == "paused"
    assert http.post(f"{path}/resume").json()["status"] == "queued"
    assert error_of(http.post(f"{path}/resume"))[:2] == (400, "not_paused")
    cancelled = http.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert cancelled["finished_at"] >= cancelled["created_at"]
    assert error_of(http.get("/v1/fine_tuning/jobs/ftjob-none"))[:2] == (404, "job_not_found")
    assert error_of(http.get("/v1/fine_tuning/jobs/ftjob-none/events?stream=true"))[:2] == (
        404,
        "job_not_found",
    )
    assert http.get(f"/v1/fine_tuning/jobs/{made['id']}/checkpoints").json()["data"] == []


def test_checkpoint_is_published_under_a_suffix(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    made = new_job(http, suffix="support")
    gateway.trainer.checkpoints[made["id"]].append(Checkpoint(id="ftckpt-1", job_id=made["id"], step=4))
    path = f"/v1/fine_tuning/jobs/{made['id']}/checkpoints"
    assert http.get(path).json()["data"][0]["fine_tuned_model_checkpoint"] == ""
    published = http.post(f"{path}/ftckpt-1/publish", json={"suffix": "early"}).json()
    assert (published["object"], published["step_number"]) == ("fine_tuning.job.checkpoint", 4)
    assert published["fine_tuned_model_checkpoint"] == f"ft:{BASE}:default:early:v1"
    assert http.get(path).json()["data"] == [published]
    own = http.post(f"{path}/ftckpt-1/publish", json={}).json()
    assert own["fine_tuned_model_checkpoint"] == f"ft:{BASE}:default:support:v1"
    for body, checkpoint, expected in (
        ({"suffix": "Not a name"}, "ftckpt-1", (400, "bad_name", "suffix")),
        ({"suffix": ""}, "ftckpt-1", (400, "invalid_value", "suffix")),
        ({"adapter": "a"}, "ftckpt-1", (400, "unsupported_parameter", "adapter")),
        ({}, "ftckpt-2", (404, "checkpoint_not_found", "checkpoint_id")),
    ):
        assert error_of(http.post(f"{path}/{checkpoint}/publish", json=body)) == expected


def test_tenants_see_their_own(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    job = new_job(http)
    gateway.adapters.publish("mine")
    with gateway.http(gateway.new_key("acme")) as other:
        assert other.get("/v1/files").json()["data"] == []
        assert other.get("/v1/fine_tuning/jobs").json()["data"] == []
        assert other.get("/v1/adapters").json()["data"] == []
        assert [model["id"] for model in other.get("/v1/models").json()["data"]] == [BASE]
        for path in (
            f"/v1/files/{job['training_file']}",
            f"/v1/fine_tuning/jobs/{job['id']}",
            "/v1/adapters/mine",
        ):
            assert other.get(path).status_code == 404


def test_models(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    gateway.adapters.publish("support")
    gateway.adapters.publish("support")
    gateway.adapters.point("support", "prod", 1)
    gateway.adapters.publish("elsewhere", fingerprint="sha256:" + "0" * 64)
    listed = http.get("/v1/models").json()
    assert [(m["id"], m["root"], m["parent"]) for m in listed["data"]] == [
        (BASE, BASE, None),
        ("support", "support:2", BASE),
        ("support@prod", "support:1", BASE),
    ]
    assert all(model.keys() >= {"id", "object", "created", "owned_by"} for model in listed["data"])
    # When the base was registered: a restart of inference makes no new model.
    assert listed["data"][0]["created"] == BASE_CREATED
    one = http.get(f"/v1/models/ft:{BASE}:default:support:v1").json()
    assert (one["id"], one["root"]) == (f"ft:{BASE}:default:support:v1", "support:1")
    assert http.get(f"/v1/models/{BASE}").json() == listed["data"][0]
    for name in ("unknown", "support:9", "support@none", "a/b", "x" * 3000):
        assert error_of(http.get(f"/v1/models/{name}")) == (404, "model_not_found", "model")


def test_adapters_and_aliases(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    versions = [gateway.adapters.publish("support") for _ in range(3)]
    gateway.adapters.publish("billing")
    listed = http.get("/v1/adapters").json()
    assert [adapter["id"] for adapter in listed["data"]] == ["billing", "support"]
    assert http.get("/v1/adapters", params={"limit": 1}).json()["has_more"] is True
    assert http.get("/v1/adapters/support").json()["latest_version"]["digest"] == versions[2].digest
    shown = http.get("/v1/adapters/support/versions", params={"limit": 2}).json()
    assert ([version["id"] for version in shown["data"]], shown["has_more"]) == (
        ["support:3", "support:2"],
        True,
    )
    path = "/v1/adapters/support/aliases/prod"
    for version in (1, 2):
        moved = http.put(path, json={"version": version}).json()
        assert (moved["name"], moved["version"], moved["generation"]) == ("prod", version, version)
    conflict = http.put(path, json={"version": 3, "expected_generation": 1})
    assert error_of(conflict)[:2] == (409, "alias_conflict")
    assert conflict.headers["x-should-retry"] == "false"
    assert http.post(f"{path}/rollback", json={}).json()["version"] == 1
    history = http.get(f"{path}/history", params={"after": "3"}).json()["data"]
    assert [move["version"] for move in history] == [2, 1]
    assert [alias["version"] for alias in http.get("/v1/adapters/support/aliases").json()["data"]] == [1]
    assert error_of(http.put(path, json={"version": 0})) == (400, "invalid_value", "version")
    assert error_of(http.get("/v1/adapters/none/aliases"))[:2] == (404, "adapter_not_found")


def test_resident_shows_only_the_callers_own(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    mine = gateway.adapters.publish("support")
    foreign = gateway.adapters.publish("support", tenant="acme")
    unknown = gateway.adapters.publish("other", tenant="acme")
    gateway.inference.resident = [
        ResidentAdapter(digest=version.digest, version_ref=f"{version.adapter}:1", tier=Tier.TIER_DEVICE)
        for version in (mine, foreign, unknown)
    ]
    data = http.get("/v1/adapters/resident").json()["data"]
    assert [(entry["digest"], entry["tier"]) for entry in data] == [(mine.digest, "device")]


def test_services_that_are_away(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    stopping = asyncio.run_coroutine_threadsafe(gateway.hosts["trainer"].stop(grace_seconds=0), gateway.loop)
    stopping.result(10)
    ready = httpx.get(gateway.url + "/readyz")
    assert (ready.status_code, ready.json()["services"]["trainer"]) == (503, "unreachable")
    response = http.get("/v1/fine_tuning/jobs")
    assert error_of(response)[:2] == (503, "unavailable")
    assert response.headers["retry-after"] == "1"
    assert "127.0.0.1" not in response.text
    assert http.get("/v1/files").status_code == 200
