"""Resumable uploads: committed offsets, restarts, expiry, and one file at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lorafleet.registry.v1 import file_pb2
from services.common.errors import LorafleetError
from tests.support.registry import Client, Place, registry_client, running_registry, sha256
from tests.support.registry import reason_of as reason
from tests.support.registry_fixtures import client, local, place, s3_server, stored_keys

__all__ = ["client", "local", "place", "s3_server"]

MIB = 1024 * 1024
DATA = bytes(range(256)) * (10 * 1024)


async def start(client: Client, size_bytes: int = len(DATA), digest: str = "") -> str:
    header = file_pb2.CreateFileHeader(
        filename="train.jsonl", purpose=file_pb2.FILE_PURPOSE_FINE_TUNE, digest=digest
    )
    request = file_pb2.StartUploadRequest(header=header, size_bytes=size_bytes)
    upload: file_pb2.Upload = await client.call(client.files.StartUpload, request)
    assert upload.committed_bytes == 0
    return upload.id


async def append(client: Client, upload_id: str, chunks: Iterable[tuple[int, bytes]]) -> int:
    requests = (
        file_pb2.AppendUploadRequest(upload_id=upload_id, offset=offset, data=data) for offset, data in chunks
    )
    upload: file_pb2.Upload = await client.call(client.files.AppendUpload, requests)
    return upload.committed_bytes


async def committed(client: Client, upload_id: str) -> int:
    upload: file_pb2.Upload = await client.call(
        client.files.GetUpload, file_pb2.GetUploadRequest(upload_id=upload_id)
    )
    return upload.committed_bytes


async def complete(client: Client, upload_id: str, digest: str = "") -> file_pb2.File:
    request = file_pb2.CompleteUploadRequest(upload_id=upload_id, digest=digest)
    result: file_pb2.File = await client.call(client.files.CompleteUpload, request)
    return result


def chunks(first: int, last: int, size_bytes: int = 256 * 1024) -> list[tuple[int, bytes]]:
    return [
        (offset, DATA[offset : min(last, offset + size_bytes)]) for offset in range(first, last, size_bytes)
    ]


async def test_an_upload_goes_on_after_a_restart(place: Place) -> None:
    async with registry_client(place) as client:
        upload_id = await start(client)
        assert await append(client, upload_id, chunks(0, MIB + 5000)) == MIB + 5000
    async with running_registry(place) as channel:
        client = Client(channel, "acme")
        assert await committed(client, upload_id) == MIB + 5000
        assert await append(client, upload_id, chunks(MIB + 5000, len(DATA))) == len(DATA)
        file = await complete(client, upload_id, sha256(DATA))
        assert file.size_bytes == len(DATA)
        assert await client.download_file(file.id) == DATA
        again = await complete(client, upload_id, sha256(DATA))
        assert again == file
        assert await reason(committed(client, upload_id)) == "upload_not_found"


async def test_row_31_other_bytes_than_announced_leave_nothing(client: Client, tmp_path: Path) -> None:
    before = stored_keys(tmp_path)
    for field in ("start", "complete"):
        upload_id = await start(client, digest=sha256(b"other") if field == "start" else "")
        await append(client, upload_id, chunks(0, len(DATA)))
        digest = sha256(b"other") if field == "complete" else ""
        assert await reason(complete(client, upload_id, digest)) == "digest_mismatch"
        assert await reason(committed(client, upload_id)) == "upload_not_found"
    assert stored_keys(tmp_path) == before


async def test_row_32_more_than_announced_is_refused(client: Client) -> None:
    upload_id = await start(client, 1000)
    assert await reason(append(client, upload_id, [(0, bytes(1001))])) == "too_large"
    assert await append(client, upload_id, [(0, bytes(900))]) == 900
    assert await reason(append(client, upload_id, [(900, bytes(101))])) == "too_large"
    assert await reason(start(client, 10**12)) == "too_large"
    assert await reason(start(client, 0)) == "empty_file"
    assert await committed(client, upload_id) == 900


@pytest.mark.parametrize(
    ("offset", "size_bytes"),
    [(2000, 10), (1001, 1), (999, 2), (0, 1001)],
    ids=["gap", "next byte but one", "overlap", "all and more"],
)
async def test_row_33_chunks_out_of_order(client: Client, offset: int, size_bytes: int) -> None:
    upload_id = await start(client)
    await append(client, upload_id, [(0, DATA[:1000])])
    with pytest.raises(LorafleetError) as caught:
        await append(client, upload_id, [(offset, DATA[offset : offset + size_bytes])])
    assert caught.value.reason == "bad_offset"
    assert caught.value.metadata["committed_bytes"] == "1000"
    assert await committed(client, upload_id) == 1000


async def test_row_33_the_same_chunk_again_changes_nothing(client: Client) -> None:
    upload_id = await start(client)
    pieces = chunks(0, len(DATA))
    assert await append(client, upload_id, [*pieces[:3], pieces[1], *pieces[1:4]]) == 4 * 256 * 1024
    assert await append(client, upload_id, pieces) == len(DATA)
    assert await reason(append(client, upload_id, [(0, b"other bytes")])) == "bad_offset"
    assert (await complete(client, upload_id, sha256(DATA))).size_bytes == len(DATA)


async def test_an_upload_ends_only_when_all_has_come(client: Client) -> None:
    upload_id = await start(client)
    await append(client, upload_id, [(0, DATA[:10])])
    assert await reason(complete(client, upload_id)) == "upload_incomplete"
    assert await reason(complete(client, upload_id, "sha256:X")) == "bad_digest"
    await client.call(client.files.CancelUpload, file_pb2.CancelUploadRequest(upload_id=upload_id))
    assert await reason(committed(client, upload_id)) == "upload_not_found"


async def test_row_34_an_abandoned_upload_ends(local: Place, tmp_path: Path) -> None:
    async with registry_client(local, upload_seconds=0.2) as client:
        before = stored_keys(tmp_path)
        upload_id = await start(client)
        calls: list[Any] = [
            lambda: committed(client, upload_id),
            lambda: append(client, upload_id, [(0, b"x")]),
            lambda: complete(client, upload_id),
        ]
        await asyncio.sleep(0.3)
        for call in calls:
            assert await reason(call()) == "upload_not_found"
        assert stored_keys(tmp_path) != before


async def test_row_42_an_upload_of_another_tenant_is_unknown(local: Place) -> None:
    async with registry_client(local) as client:
        other = client.as_tenant("globex")
        upload_id = await start(client)
        for call in (
            committed(other, upload_id),
            append(other, upload_id, [(0, b"x")]),
            complete(other, upload_id),
            committed(other, "upload-../../x"),
        ):
            assert await reason(call) == "upload_not_found"


async def test_a_tenant_has_so_many_uploads_open_at_most(local: Place) -> None:
    async with registry_client(local, max_open_uploads=2) as client:
        await start(client)
        await start(client)
        assert await reason(start(client)) == "too_many_uploads"
