"""`/v1/uploads` over HTTP: parts in any order, checks at the end, ends of every kind."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from services.common.store import DirectoryStore
from services.gateway.upload_parts import KEPT_SECONDS, Announced, UploadParts
from tests.support.gateway import GatewayUnderTest, running_gateway
from tests.support.registry import Place

DATA = b'{"prompt": "a", "completion": "b"}\n' * 1000
MD5 = hashlib.md5(DATA, usedforsecurity=False).hexdigest()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path, max_file_bytes=100_000) as running:
        yield running


@pytest.fixture
def http(gateway: GatewayUnderTest) -> Iterator[httpx.Client]:
    with gateway.http() as client:
        yield client


def announce(http: httpx.Client, **changes: Any) -> httpx.Response:
    body = {"filename": "rows.jsonl", "purpose": "fine-tune", "bytes": len(DATA), "mime_type": "text/jsonl"}
    return http.post("/v1/uploads", json=body | changes)


def begin(http: httpx.Client, **changes: Any) -> str:
    upload = announce(http, **changes).json()
    assert (upload["object"], upload["status"], upload["file"]) == ("upload", "pending", None)
    return str(upload["id"])


def add(http: httpx.Client, upload_id: str, data: bytes) -> httpx.Response:
    return http.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("part", data)})


def complete(http: httpx.Client, upload_id: str, part_ids: list[str], **more: str) -> httpx.Response:
    return http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids, **more})


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def kept(tmp_path: Path) -> list[str]:
    return [found.key for found in DirectoryStore(tmp_path / "store").list("gateway/uploads/")]


def test_parts_come_in_any_order(gateway: GatewayUnderTest, http: httpx.Client, tmp_path: Path) -> None:
    upload_id = begin(http)
    cuts = [(20_000, len(DATA)), (0, 12_000), (12_000, 20_000)]
    third, first, second = (add(http, upload_id, DATA[start:end]).json() for start, end in cuts)
    assert (first["object"], first["upload_id"]) == ("upload.part", upload_id)
    add(http, upload_id, DATA[:5])
    answer = complete(http, upload_id, [first["id"], second["id"], third["id"]], md5=MD5).json()
    assert (answer["status"], answer["file"]["bytes"]) == ("completed", len(DATA))
    assert (answer["file"]["object"], answer["file"]["filename"]) == ("file", "rows.jsonl")
    assert http.get(f"/v1/files/{answer['file']['id']}/content").content == DATA
    assert [key for key in kept(tmp_path) if "/parts/" in key] == []
    # As a client that has lost the first answer does.
    assert complete(http, upload_id, [first["id"]]).json() == answer
    assert error_of(add(http, upload_id, b"x"))[:2] == (400, "upload_completed")
    assert error_of(http.post(f"/v1/uploads/{upload_id}/cancel"))[:2] == (400, "upload_completed")


def test_what_does_not_fit_can_be_put_right(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    upload_id = begin(http)
    half = len(DATA) // 2
    first, second = (add(http, upload_id, part).json()["id"] for part in (DATA[:half], DATA[half:]))
    assert error_of(complete(http, upload_id, [first])) == (400, "size_mismatch", "part_ids")
    unknown = "part-" + "0" * 26
    assert error_of(complete(http, upload_id, [first, unknown])) == (400, "part_not_found", "part_ids[1]")
    assert error_of(complete(http, upload_id, [first, "../x"])) == (400, "part_not_found", "part_ids[1]")
    wrong = complete(http, upload_id, [first, second], md5="0" * 32)
    assert error_of(wrong) == (400, "md5_mismatch", "md5")
    assert error_of(complete(http, upload_id, []))[2] == "part_ids"
    assert error_of(complete(http, upload_id, [first, second], md5="x"))[2] == "md5"
    assert complete(http, upload_id, [first, second]).status_code == 200


def test_a_cancelled_upload_is_gone(gateway: GatewayUnderTest, http: httpx.Client, tmp_path: Path) -> None:
    upload_id = begin(http)
    part = add(http, upload_id, DATA[:10]).json()["id"]
    for _ in range(2):
        assert http.post(f"/v1/uploads/{upload_id}/cancel").json()["status"] == "cancelled"
    assert not gateway.files.open
    assert error_of(complete(http, upload_id, [part]))[:2] == (400, "upload_cancelled")
    assert [key for key in kept(tmp_path) if "/parts/" in key] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bytes": 0}, (400, "invalid_value", "bytes")),
        ({"bytes": 2 << 20}, (413, "too_large", "bytes")),
        ({"bytes": True}, (400, "invalid_value", "bytes")),
        ({"purpose": "assistants"}, (400, "invalid_value", "purpose")),
        ({"filename": ""}, (400, "invalid_value", "filename")),
        ({"expires_after": {"seconds": 3600}}, (400, "unsupported_parameter", "expires_after")),
    ],
)
def test_what_cannot_be_announced(http: httpx.Client, changes: dict[str, Any], expected: object) -> None:
    assert error_of(announce(http, **changes)) == expected


def test_parts_are_bounded(gateway: GatewayUnderTest, http: httpx.Client) -> None:
    upload_id = begin(http, bytes=100)
    assert error_of(add(http, upload_id, b"")) == (400, "empty_part", "data")
    assert error_of(add(http, upload_id, b"x" * 101)) == (413, "too_large", "data")
    assert [add(http, upload_id, b"x" * 100).status_code for _ in range(3)] == [200, 200, 413]
    wrong = http.post(f"/v1/uploads/{upload_id}/parts", files={"file": ("part", b"x")})
    assert error_of(wrong) == (400, "unsupported_parameter", "file")


@pytest.mark.parametrize("upload_id", ["upload-x", "upload-" + "0" * 26, "x", "..%2F..%2Fkeys"])
def test_uploads_of_others_and_of_nobody(
    gateway: GatewayUnderTest, http: httpx.Client, upload_id: str
) -> None:
    with gateway.http(gateway.new_key("other")) as other:
        foreign = begin(other)
    for named in (upload_id, foreign):
        for response in (
            add(http, named, b"x"),
            complete(http, named, ["part-x"]),
            http.post(f"/v1/uploads/{named}/cancel"),
        ):
            assert response.status_code == 404
    assert len(gateway.files.open) == 1


def test_a_completion_whose_answer_was_lost_is_found_again(
    gateway: GatewayUnderTest, http: httpx.Client, tmp_path: Path
) -> None:
    upload_id = begin(http)
    part = add(http, upload_id, DATA).json()["id"]
    answer = complete(http, upload_id, [part]).json()
    # As if the gateway had died before it wrote down the end.
    store = DirectoryStore(tmp_path / "store")
    store.delete(f"gateway/uploads/default/{upload_id}/end")
    store.put(f"gateway/uploads/default/{upload_id}/parts/{part}", DATA)
    assert error_of(http.post(f"/v1/uploads/{upload_id}/cancel"))[:2] == (400, "upload_completed")
    store.delete(f"gateway/uploads/default/{upload_id}/end")
    store.put(f"gateway/uploads/default/{upload_id}/parts/{part}", DATA)
    assert complete(http, upload_id, [part]).json() == answer


def test_expired_uploads_are_refused_and_then_swept(
    gateway: GatewayUnderTest, http: httpx.Client, tmp_path: Path
) -> None:
    store = DirectoryStore(tmp_path / "store")
    parts = UploadParts(store)
    ids = ["upload-" + digit * 26 for digit in "123"]
    for upload_id, age in zip(ids, (-1000, 1, KEPT_SECONDS + 1), strict=True):
        expire = int(time.time()) - age
        announced = Announced(
            id=upload_id, filename="a", purpose="fine-tune", mime_type="", size_bytes=9,
            create_time=expire - 3600, expire_time=expire,
        )  # fmt: skip
        parts.announce("default", announced)
        store.put(f"gateway/uploads/default/{upload_id}/parts/part-{'0' * 26}", b"x")
    assert add(http, ids[0], b"x").status_code == 200
    assert error_of(add(http, ids[1], b"x"))[:2] == (400, "upload_expired")
    assert parts.sweep() == 2
    assert error_of(add(http, ids[2], b"x"))[:2] == (404, "upload_not_found")
    assert {key.split("/")[3] for key in kept(tmp_path)} == set(ids[:2])


def test_the_stock_client_uploads_in_chunks_into_a_real_registry(redis_url: str, tmp_path: Path) -> None:
    place = Place.in_directory(redis_url, tmp_path / "registry")
    with (
        running_gateway(tmp_path, registry=place.settings()) as running,
        OpenAI(base_url=f"{running.url}/v1", api_key=running.key) as client,
    ):
        upload = client.uploads.upload_file_chunked(
            file=DATA, filename="rows.jsonl", bytes=len(DATA), mime_type="text/jsonl", purpose="fine-tune",
            part_size=10_000, md5=MD5,
        )  # fmt: skip
        assert upload.status == "completed"
        assert upload.file is not None
        assert client.files.content(upload.file.id).read() == DATA
        dropped = client.uploads.create(bytes=9, filename="a", mime_type="", purpose="fine-tune")
        client.uploads.parts.create(dropped.id, data=b"x")
        assert client.uploads.cancel(dropped.id).status == "cancelled"
