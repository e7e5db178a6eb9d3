"""Bytes are streamed: however many clients move however much, the registry holds little of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

from lorafleet.registry.v1 import file_pb2
from services.common.call_context import call_scope
from services.common.transport import CHUNK_BYTES
from tests.support.forked_registry import forget_peak, forked_registry, peak_bytes, resident_bytes
from tests.support.registry import Client, Place, registry_client
from tests.support.registry_fixtures import client, local, place, s3_server

__all__ = ["client", "local", "place", "s3_server"]

MB = 1_000_000
FILE_BYTES = 12 * MB
NUM_CLIENTS = 24
MOST_GROWTH_BYTES = 120 * MB


async def create(client: Client, data: bytes) -> str:
    def requests() -> Iterator[file_pb2.CreateFileRequest]:
        header = file_pb2.CreateFileHeader(filename="a", purpose=file_pb2.FILE_PURPOSE_FINE_TUNE)
        yield file_pb2.CreateFileRequest(header=header)
        for start in range(0, len(data), CHUNK_BYTES):
            yield file_pb2.CreateFileRequest(data=data[start : start + CHUNK_BYTES])

    return str((await client.call(client.files.CreateFile, requests())).id)


async def received_bytes(client: Client, file_id: str) -> int:
    total = 0
    with call_scope(tenant=client.tenant):
        async for response in client.files.DownloadFile(
            file_pb2.DownloadFileRequest(file_id=file_id), timeout=100
        ):
            total += len(response.data)
    return total


async def test_memory_does_not_follow_what_is_under_way(place: Place) -> None:
    data = os.urandom(FILE_BYTES)
    async with forked_registry(place) as (process, client):
        file_id = await create(client, data)
        await received_bytes(client, file_id)
        settled_bytes = resident_bytes(process)
        forget_peak(process)
        await asyncio.gather(*(create(client, data) for _ in range(NUM_CLIENTS)))
        uploading_bytes = peak_bytes(process) - settled_bytes
        forget_peak(process)
        received = await asyncio.gather(*(received_bytes(client, file_id) for _ in range(NUM_CLIENTS)))
        downloading_bytes = peak_bytes(process) - settled_bytes
    assert received == [FILE_BYTES] * NUM_CLIENTS
    # 288 MB are under way each time.
    assert uploading_bytes < MOST_GROWTH_BYTES
    assert downloading_bytes < MOST_GROWTH_BYTES


async def test_a_client_that_does_not_read_keeps_nobody_waiting(local: Place) -> None:
    async with registry_client(local, max_transfers=1) as client:
        file_id = await create(client, os.urandom(FILE_BYTES))
        request = file_pb2.DownloadFileRequest(file_id=file_id)
        with call_scope(tenant=client.tenant):
            stalled = client.files.DownloadFile(request, timeout=100)
            first: Any = await stalled.read()
            assert len(first.data) > 0
        async with asyncio.timeout(30):
            assert await received_bytes(client, file_id) == FILE_BYTES
        stalled.cancel()
