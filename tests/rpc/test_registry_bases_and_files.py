"""Bases and files through the real registry."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import redis.asyncio

from lorafleet.registry.v1 import base_model_pb2, file_pb2
from services.common.errors import Code, LorafleetError
from services.common.fingerprint import ComputeDtype
from services.common.store import DirectoryStore
from tests.support.registry import (
    FINGERPRINT,
    Client,
    Place,
    base_message,
    other_fingerprint,
    reason_of,
    registry_client,
    running_registry,
    sha256,
)


@pytest.fixture
def place(redis_url: str, tmp_path: Path) -> Place:
    return Place.in_directory(redis_url, tmp_path / "objects")


@pytest.fixture
async def client(place: Place) -> AsyncIterator[Client]:
    async with registry_client(place) as running:
        yield running


async def create(client: Client, base: base_model_pb2.BaseModel) -> base_model_pb2.BaseModel:
    request = base_model_pb2.CreateBaseModelRequest(base_model=base)
    result: base_model_pb2.BaseModel = await client.call(client.bases.CreateBaseModel, request)
    return result


async def test_bases_by_name_by_digest_and_listed(client: Client, place: Place) -> None:
    get, list_all = client.bases.GetBaseModel, client.bases.ListBaseModels
    for name in ("another", "zephyr"):
        await create(client, base_message(name, other_fingerprint(weights_digest=sha256(name.encode()))))
    by_name = await client.call(get, base_model_pb2.GetBaseModelRequest(name="tiny"))
    by_digest = await client.call(get, base_model_pb2.GetBaseModelRequest(digest=FINGERPRINT.digest))
    assert by_name == by_digest
    assert by_name.HasField("create_time")
    expected = base_message()
    expected.create_time.CopyFrom(by_name.create_time)
    assert by_name == expected
    async with redis.asyncio.Redis.from_url(place.redis_url) as index:
        await index.flushall()
    first = await client.call(list_all, base_model_pb2.ListBaseModelsRequest(page_size=2))
    assert [base.name for base in first.base_models] == ["another", "tiny"]
    rest = base_model_pb2.ListBaseModelsRequest(page_token=first.next_page_token)
    assert [base.name for base in (await client.call(list_all, rest)).base_models] == ["zephyr"]
    for request, reason in [
        (base_model_pb2.GetBaseModelRequest(name="nobody"), "base_not_found"),
        (base_model_pb2.GetBaseModelRequest(digest=sha256(b"nothing")), "base_not_found"),
        (base_model_pb2.GetBaseModelRequest(name="../x"), "bad_name"),
        (base_model_pb2.GetBaseModelRequest(digest="x"), "bad_digest"),
        (base_model_pb2.GetBaseModelRequest(), "missing_field"),
    ]:
        assert await reason_of(client.call(get, request)) == reason


async def test_a_name_keeps_its_fingerprint(client: Client) -> None:
    get = base_model_pb2.GetBaseModelRequest(name="tiny")
    first = await client.call(client.bases.GetBaseModel, get)
    assert await create(client, base_message()) == first
    # The compute type is recorded and not bound: it is the same base.
    same_values = replace(FINGERPRINT.quantization, compute_dtype=ComputeDtype.FLOAT32)
    assert await create(client, base_message("tiny", other_fingerprint(quantization=same_values))) == first
    with pytest.raises(LorafleetError) as caught:
        await create(client, base_message("tiny", other_fingerprint(weights_digest=sha256(b"other"))))
    assert (caught.value.code, caught.value.reason) == (Code.ALREADY_EXISTS, "base_exists")
    await create(client, base_message("second-name"))
    by_digest = base_model_pb2.GetBaseModelRequest(digest=FINGERPRINT.digest)
    assert (await client.call(client.bases.GetBaseModel, by_digest)).name == "tiny"


BAD_BASES: list[tuple[str, Callable[[base_model_pb2.BaseModel], object]]] = [
    ("bad_name", lambda b: setattr(b, "name", "a/b")),
    ("bad_digest", lambda b: setattr(b.fingerprint, "digest", "")),
    ("digest_mismatch", lambda b: setattr(b.fingerprint, "weights_digest", sha256(b"x"))),
    ("digest_mismatch", lambda b: setattr(b.fingerprint, "weights_digest", "x")),
    ("bad_quantization", lambda b: setattr(b.fingerprint.quantization, "type", 0)),
    ("bad_quantization", lambda b: setattr(b.fingerprint.quantization, "block_size", 63)),
    ("bad_quantization", lambda b: setattr(b.fingerprint.quantization, "compute_dtype", "int8")),
    ("unsupported_field", lambda b: b.create_time.FromSeconds(1)),
    ("bad_base_model", lambda b: setattr(b, "hidden_size", 0)),
    ("bad_base_model", lambda b: setattr(b, "architecture", "a b")),
    ("bad_module", lambda b: b.linear_modules.append(b.linear_modules[0])),
    ("bad_module", lambda b: b.linear_modules.add(name="x", in_features=0, out_features=1)),
    ("bad_module", lambda b: b.linear_modules.add(name="", in_features=1, out_features=1)),
    ("bad_module", lambda b: b.linear_modules.add(name="x\n", in_features=1, out_features=1)),
]


async def test_bad_bases_are_refused(client: Client, tmp_path: Path) -> None:
    before = [found.key for found in DirectoryStore(tmp_path / "objects").list("")]
    for number, (reason, change) in enumerate(BAD_BASES):
        base = base_message(f"new-{number}")
        change(base)
        assert await reason_of(create(client, base)) == reason, number
    assert [found.key for found in DirectoryStore(tmp_path / "objects").list("")] == before


async def test_file_round_trip_flush_and_restart(place: Place) -> None:
    data = secrets.token_bytes(5000)
    async with registry_client(place) as client:
        file = await client.create_file(data, "train é.jsonl", digest=sha256(data))
        assert (file.filename, file.size_bytes, file.digest) == ("train é.jsonl", 5000, sha256(data))
        assert file.purpose == file_pb2.FILE_PURPOSE_FINE_TUNE
        get = file_pb2.GetFileRequest(file_id=file.id)
        assert await client.call(client.files.GetFile, get) == file
        for offset, length in [(0, 0), (0, 1), (100, 200), (4999, 5), (5000, 0)]:
            got = await client.download_file(file.id, offset=offset, length=length)
            assert got == data[offset : offset + length if length else None]
        assert await reason_of(client.download_file(file.id, offset=5001)) == "bad_range"
        same = await client.create_file(data, "again.jsonl", purpose=file_pb2.FILE_PURPOSE_FINE_TUNE_RESULTS)
        assert same.id != file.id
        gone = await client.create_file(b"x")
        await client.call(client.files.DeleteFile, file_pb2.DeleteFileRequest(file_id=gone.id))
        before = await client.call(client.files.ListFiles, file_pb2.ListFilesRequest())
        assert [found.id for found in before.files] == [same.id, file.id]
        async with redis.asyncio.Redis.from_url(place.redis_url) as index:
            await index.flushall()
        assert await client.call(client.files.ListFiles, file_pb2.ListFilesRequest()) == before
    async with running_registry(place) as channel:
        client = Client(channel, "acme")
        assert await client.call(client.files.ListFiles, file_pb2.ListFilesRequest()) == before
        assert await client.download_file(file.id) == data
        for call in (
            client.download_file(gone.id),
            client.call(client.files.GetFile, file_pb2.GetFileRequest(file_id=gone.id)),
            client.call(client.files.DeleteFile, file_pb2.DeleteFileRequest(file_id=gone.id)),
        ):
            assert await reason_of(call) == "file_not_found"


async def test_file_pages_and_purposes(client: Client) -> None:
    made = [await client.create_file(b"x", f"{number}", purpose=1 + number % 2) for number in range(5)]
    newest_first = sorted((file.id for file in made), reverse=True)
    seen: list[str] = []
    token = ""
    while True:
        request = file_pb2.ListFilesRequest(page_size=2, page_token=token)
        page = await client.call(client.files.ListFiles, request)
        seen += [file.id for file in page.files]
        token = page.next_page_token
        if not token:
            break
    assert seen == newest_first
    results = file_pb2.ListFilesRequest(purpose=file_pb2.FILE_PURPOSE_FINE_TUNE_RESULTS)
    found = (await client.call(client.files.ListFiles, results)).files
    assert {file.filename for file in found} == {"1", "3"}
    unknown = file_pb2.ListFilesRequest(purpose=9)  # type: ignore[arg-type]
    assert await reason_of(client.call(client.files.ListFiles, unknown)) == "bad_purpose"


async def test_bad_files_leave_nothing(place: Place, tmp_path: Path) -> None:
    async with registry_client(place, max_file_bytes=100) as client:
        store = DirectoryStore(tmp_path / "objects")
        before = [found.key for found in store.list("")]
        for name in ("", "a/b", "a\\b", "..", "a\nb", "a\0", "x" * 256, "a\u202eb"):
            assert await reason_of(client.create_file(b"x", name)) == "bad_filename", name
        assert await reason_of(client.create_file(b"x", purpose=0)) == "bad_purpose"
        assert await reason_of(client.create_file(b"x", digest="sha256:x")) == "bad_digest"
        assert await reason_of(client.create_file(b"x", digest=sha256(b"y"))) == "digest_mismatch"
        assert await reason_of(client.create_file(b"")) == "empty_file"
        assert await reason_of(client.create_file(b"x" * 101)) == "too_large"
        no_header = iter([file_pb2.CreateFileRequest(data=b"x")])
        assert await reason_of(client.call(client.files.CreateFile, no_header)) == "bad_stream"
        assert await reason_of(client.call(client.files.CreateFile, iter([]))) == "bad_stream"
        for file_id in ("", "x", "file-../../etc/passwd", "file-" + "0" * 26):
            request = file_pb2.GetFileRequest(file_id=file_id)
            assert await reason_of(client.call(client.files.GetFile, request)) == "file_not_found"
        assert [found.key for found in store.list("")] == before
        assert (await client.create_file(b"x" * 100)).size_bytes == 100
