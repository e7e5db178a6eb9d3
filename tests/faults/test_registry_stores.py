"""Rows 121 to 136: stores that are down, slow, full, cut off or misbehaving, under a running registry."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import resource
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis.asyncio
import urllib3
from minio.credentials.providers import StaticProvider
from minio.error import S3Error

from lorafleet.registry.v1 import file_pb2
from lorafleet.registry.v1.adapter_pb2 import AcquireLeaseRequest, DeleteVersionRequest
from lorafleet.registry.v1.base_model_pb2 import CreateBaseModelRequest
from services.common.channels import open_channel
from services.common.errors import LorafleetError
from services.common.server import ServiceHost
from services.common.store import S3Store, directory
from services.common.store.s3 import _translated
from services.common.valkey import EmbeddedValkey
from services.registry import clock, collection
from services.registry.service import SERVICES, Registry
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.registry import Client, Place, Upload, base_message, reason_of, registry_client, sha256
from tests.support.registry_fixtures import WEIGHTS, client, local, s3_server, stored_keys
from tests.support.s3_server import S3Server

__all__ = ["client", "local", "s3_server"]

MIB = 1024 * 1024


async def eventually(call: Callable[[], Awaitable[object]], within_seconds: float) -> None:
    """Wait until a call works."""
    deadline = time.monotonic() + within_seconds
    while True:
        try:
            await call()
        except LorafleetError as error:
            if error.reason != "store_unavailable" or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)
        else:
            return


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["restart", "kill -9"])
async def test_row_121_the_index_goes_and_comes_back(tmp_path: Path, end: signal.Signals) -> None:
    server = EmbeddedValkey.start(tmp_path / "valkey")
    try:
        place = Place.in_directory(server.url, tmp_path / "objects")
        async with registry_client(place) as client:
            first = await client.publish(Upload.made(0), key="a")
            await client.set_alias("prod", 1)
            refs = ("billing", "billing:1", "billing@prod", f"billing@{first.digest}")
            before = [await client.resolve(ref) for ref in refs]
            load = asyncio.create_task(resolve_for_ever(client))
            os.kill(server.pid, end)
            server.stop()
            with pytest.raises(LorafleetError) as refused:
                await client.publish(Upload.made(1), key="b")
            assert refused.value.reason == "store_unavailable"
            assert refused.value.retry_after_seconds is not None
            assert [await client.resolve(ref) for ref in refs] == before
            assert await client.download("billing@prod", WEIGHTS) == Upload.made(0).weights
            # Of what was not asked before nothing is known, not even that it is not there.
            assert await reason_of(client.resolve("other")) == "store_unavailable"
            server = EmbeddedValkey.start(tmp_path / "valkey", port=server.port)
            await eventually(lambda: client.publish(Upload.made(1), key="b"), within_seconds=5)
            assert (await client.resolve("billing")).version == 2
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
    finally:
        server.stop()


async def resolve_for_ever(client: Client) -> None:
    while True:
        assert (await client.resolve("billing")).version in (1, 2)
        await asyncio.sleep(0.01)


async def test_row_121_an_answer_from_memory_is_never_older_than_a_write(tmp_path: Path) -> None:
    server = EmbeddedValkey.start(tmp_path / "valkey")
    try:
        async with registry_client(Place.in_directory(server.url, tmp_path / "objects")) as client:
            await client.publish(Upload.made(0))
            await client.set_alias("prod", 1)
            assert (await client.resolve("billing@prod")).version == 1
            await client.publish(Upload.made(1))
            await client.set_alias("prod", 2)
            server.stop()
            # The move overwrote what was known, and nobody asked since.
            assert await reason_of(client.resolve("billing@prod")) == "store_unavailable"
    finally:
        server.stop()


async def test_row_121_memory_is_silent_once_another_registry_wrote(tmp_path: Path) -> None:
    first, second = (EmbeddedValkey.start(tmp_path / name) for name in ("first", "second"))
    try:
        place = Place.in_directory(first.url, tmp_path / "objects")
        async with registry_client(place) as client:
            await client.publish(Upload.made(0))
            await client.resolve("billing")
            first.stop()
            async with registry_client(dataclasses.replace(place, redis_url=second.url)) as other:
                assert (await other.publish(Upload.made(1))).version == 2
                assert await reason_of(client.resolve("billing")) == "not_the_writer"
    finally:
        first.stop()
        second.stop()


async def test_row_123_a_damaged_index_file_costs_no_version(tmp_path: Path) -> None:
    server = EmbeddedValkey.start(tmp_path / "valkey")
    try:
        place = Place.in_directory(server.url, tmp_path / "objects")
        async with registry_client(place) as client:
            for seed in range(3):
                await client.publish(Upload.made(seed))
            os.kill(server.pid, signal.SIGKILL)
            server.stop()
            [log] = (tmp_path / "valkey" / "appendonlydir").glob("*.incr.aof")
            log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
            server = EmbeddedValkey.start(tmp_path / "valkey", port=server.port)
            await eventually(lambda: client.resolve("billing:3"), within_seconds=5)
            assert await client.download("billing:3", WEIGHTS) == Upload.made(2).weights
    finally:
        server.stop()


async def test_row_125_an_index_that_refuses_writes(client: Client, local: Place) -> None:
    await client.publish(Upload.made(0))
    async with redis.asyncio.Redis.from_url(local.redis_url) as index:
        await index.config_set("min-replicas-to-write", 1)
        try:
            assert await reason_of(client.publish(Upload.made(1), key="b")) == "store_unavailable"
        finally:
            await index.config_set("min-replicas-to-write", 0)
        await eventually(lambda: client.publish(Upload.made(1), key="b"), within_seconds=5)
        assert (await client.resolve("billing")).version == 2


@pytest.fixture
async def index_proxy(redis_url: str) -> AsyncIterator[FaultProxy]:
    parts = urlsplit(redis_url)
    assert parts.hostname is not None
    assert parts.port is not None
    async with fault_proxy(parts.hostname, parts.port) as proxy:
        yield proxy


async def test_row_126_an_index_that_does_not_answer(index_proxy: FaultProxy, tmp_path: Path) -> None:
    place = Place.in_directory(f"redis://127.0.0.1:{index_proxy.port}/0", tmp_path / "objects")
    async with registry_client(place) as client:
        await client.publish(Upload.made(0))
        index_proxy.is_blackhole = True
        started = time.monotonic()
        assert await reason_of(client.resolve("billing")) == "store_unavailable"
        assert time.monotonic() - started < 12
        index_proxy.is_blackhole = False
        await eventually(lambda: client.resolve("billing"), within_seconds=8)


async def test_row_126_a_slow_index_is_waited_for(index_proxy: FaultProxy, tmp_path: Path) -> None:
    place = Place.in_directory(f"redis://127.0.0.1:{index_proxy.port}/0", tmp_path / "objects")
    async with registry_client(place) as client:
        index_proxy.latency_seconds = 0.3
        assert (await client.publish(Upload.made(0))).version == 1


@pytest.fixture
async def store_proxy(s3_server: S3Server) -> AsyncIterator[FaultProxy]:
    parts = urlsplit(s3_server.endpoint)
    assert parts.hostname is not None
    assert parts.port is not None
    async with fault_proxy(parts.hostname, parts.port) as proxy:
        yield proxy


def behind(proxy: FaultProxy, server: S3Server, redis_url: str) -> Place:
    through = dataclasses.replace(server, endpoint=f"http://127.0.0.1:{proxy.port}")
    return Place.in_s3(redis_url, through, "faults-" + secrets.token_hex(8))


async def test_row_127_the_object_store_goes_and_comes_back(
    store_proxy: FaultProxy, s3_server: S3Server, redis_url: str
) -> None:
    async with registry_client(behind(store_proxy, s3_server, redis_url)) as client:
        await client.publish(Upload.made(0))
        await store_proxy.stop()
        assert await reason_of(client.publish(Upload.made(1), key="b")) == "store_unavailable"
        assert await reason_of(client.download("billing:1", WEIGHTS)) == "store_unavailable"
        await store_proxy.start()
        await eventually(lambda: client.publish(Upload.made(1), key="b"), within_seconds=10)
        assert await client.download("billing:2", WEIGHTS) == Upload.made(1).weights


async def test_row_128_an_overloaded_store_is_asked_again_and_then_named(
    store_proxy: FaultProxy, s3_server: S3Server, redis_url: str
) -> None:
    async with registry_client(behind(store_proxy, s3_server, redis_url)) as client:
        await store_proxy.drop_idle()
        store_proxy.num_slow_downs_left = 2
        assert (await client.publish(Upload.made(0))).version == 1
        assert store_proxy.num_slow_downs == 2
        await store_proxy.drop_idle()
        store_proxy.num_slow_downs_left = 10_000
        with pytest.raises(LorafleetError, match="SlowDown: it is overloaded") as refused:
            await client.download("billing:1", WEIGHTS)
        assert refused.value.reason == "store_unavailable"
        assert refused.value.retry_after_seconds is not None
        store_proxy.num_slow_downs_left = 0
        assert await client.download("billing:1", WEIGHTS) == Upload.made(0).weights


def test_row_128_pauses_grow_and_differ(s3_server: S3Server) -> None:
    store = store_at(s3_server, "pauses")
    retries = store._pool.connection_pool_kw["retries"]
    for _ in range(2):
        retries = retries.increment("GET", "/", response=urllib3.HTTPResponse(status=503))
    pauses = {retries.get_backoff_time() for _ in range(20)}
    assert len(pauses) > 10
    assert min(pauses) >= 0.4
    assert max(pauses) <= 0.6
    store.close()


async def test_row_128_a_store_that_trickles_is_given_up(
    store_proxy: FaultProxy, s3_server: S3Server
) -> None:
    store = store_at(s3_server, "trickle", port=store_proxy.port, chunk_timeout_seconds=0.5)
    data = os.urandom(MIB)
    await asyncio.to_thread(store.ready)
    await asyncio.to_thread(store.put, "key", data)
    assert b"".join(await asyncio.to_thread(lambda: list(store.stream("key")))) == data
    store_proxy.bytes_per_second = 1000
    started = time.monotonic()
    with pytest.raises(LorafleetError, match="sent less than") as slow:
        await asyncio.to_thread(lambda: list(store.stream("key")))
    assert slow.value.reason == "store_unavailable"
    assert time.monotonic() - started < 5
    store.close()


async def test_row_128_slow_loads_hold_up_nothing_else(
    store_proxy: FaultProxy, s3_server: S3Server, redis_url: str
) -> None:
    async with registry_client(behind(store_proxy, s3_server, redis_url)) as client:
        file = await create_file(client, [os.urandom(MIB)])
        await client.publish(Upload.made(0))
        await client.resolve("billing")
        store_proxy.bytes_per_second = 1000
        downloads = [asyncio.create_task(client.download_file(file)) for _ in range(40)]
        await asyncio.sleep(0.5)
        # For longer than the registry goes on without asking the store who writes.
        slowest_seconds = 0.0
        for _ in range(80):
            started = time.monotonic()
            await client.resolve("billing")
            slowest_seconds = max(slowest_seconds, time.monotonic() - started)
            await asyncio.sleep(0.05)
        assert slowest_seconds < 1.0
        assert not any(download.done() for download in downloads)
        store_proxy.bytes_per_second = None
        for download in downloads:
            download.cancel()
        await asyncio.wait(downloads)


async def test_row_129_a_read_that_is_cut_goes_on(
    store_proxy: FaultProxy, s3_server: S3Server, redis_url: str
) -> None:
    data = os.urandom(3 * MIB)
    async with registry_client(behind(store_proxy, s3_server, redis_url)) as client:
        client_chunks = [data[start : start + MIB] for start in range(0, len(data), MIB)]
        file = await create_file(client, client_chunks)
        store_proxy.cut_after_bytes, store_proxy.num_cuts_left = MIB + 1000, 2
        assert await client.download_file(file) == data
        assert store_proxy.num_cuts_left == 0
        store_proxy.cut_after_bytes, store_proxy.num_cuts_left = 1000, 1000
        assert await reason_of(client.download_file(file)) == "store_unavailable"


async def create_file(client: Client, chunks: list[bytes]) -> str:
    header = file_pb2.CreateFileHeader(filename="a", purpose=file_pb2.FILE_PURPOSE_FINE_TUNE)
    messages = [file_pb2.CreateFileRequest(header=header)]
    messages += [file_pb2.CreateFileRequest(data=chunk) for chunk in chunks]
    created: file_pb2.File = await client.call(client.files.CreateFile, iter(messages))
    assert created.digest == sha256(b"".join(chunks))
    return created.id


def store_at(server: S3Server, what: str, *, port: int | None = None, **options: float) -> S3Store:
    """A bucket of its own, behind the proxy at `port` where that is given."""
    return S3Store(
        urlsplit(server.endpoint).netloc if port is None else f"127.0.0.1:{port}",
        f"{what}-{secrets.token_hex(8)}",
        credentials=StaticProvider(server.access_key, server.secret_key),
        secure=False,
        **options,  # type: ignore[arg-type]
    )


def test_row_130_half_finished_multipart_uploads_are_swept(s3_server: S3Server) -> None:
    store = store_at(s3_server, "parts")
    bucket = store._bucket
    store.ready()
    store.put("whole", b"x")
    store._client._create_multipart_upload(bucket, "half", {})
    assert store.sweep(older_than_seconds=3600) == 0
    time.sleep(1.1)
    assert store.sweep(older_than_seconds=0) == 1
    assert store.sweep(older_than_seconds=0) == 0
    assert [found.key for found in store.list("")] == ["whole"]
    store.close()


async def test_row_133_revoked_credentials_are_named(s3_server: S3Server) -> None:
    store = S3Store(
        urlsplit(s3_server.endpoint).netloc,
        "refused",
        credentials=StaticProvider(s3_server.access_key, "another"),
        secure=False,
    )
    with pytest.raises(LorafleetError, match="secret key is wrong") as caught:
        await asyncio.to_thread(lambda: list(store.list("")))
    assert caught.value.reason == "store_unavailable"
    store.close()


async def test_row_133_a_rotated_secret_is_used_without_a_restart(
    s3_server: S3Server, redis_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "store.json"

    def rotate(secret_key: str) -> None:
        fresh = tmp_path / "fresh"
        fresh.write_text(json.dumps({"access_key": s3_server.access_key, "secret_key": secret_key}))
        fresh.replace(file)

    rotate(s3_server.secret_key)
    url = f"{s3_server.store_url('rotated-' + secrets.token_hex(8))}&credentials_file={file}"
    async with registry_client(Place(redis_url, url)) as client:
        await client.publish(Upload.made(0))
        rotate("revoked")
        assert await reason_of(client.publish(Upload.made(1))) == "store_unavailable"
        assert "the object store refuses" in caplog.messages
        rotate(s3_server.secret_key)
        assert (await client.publish(Upload.made(1))).version == 2
        file.write_text("{")
        assert (await client.publish(Upload.made(2))).version == 3
        assert "store credentials cannot be read" in caplog.messages
    assert s3_server.secret_key not in caplog.text


def test_row_134_clock_skew_is_named() -> None:
    with pytest.raises(LorafleetError, match="clocks") as caught, _translated():
        raise S3Error(urllib3.HTTPResponse(status=403), "RequestTimeTooSkewed", "", "", "", "")
    assert caught.value.reason == "store_unavailable"


async def test_row_135_a_full_disk_refuses_and_keeps_what_is_there(client: Client, tmp_path: Path) -> None:
    await client.publish(Upload.made(0))
    before = stored_keys(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # The whole process, and nothing but the registry writes here.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert await reason_of(client.publish(Upload.made(1), key="b")) == "storage_full"
        assert await reason_of(client.create_file(bytes(5000))) == "storage_full"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert stored_keys(tmp_path) == before
    assert await client.download("billing:1", WEIGHTS) == Upload.made(0).weights
    assert (await client.publish(Upload.made(1), key="b")).version == 2


@pytest.mark.parametrize(
    "number", [errno.EROFS, errno.EIO, errno.ENOSPC, errno.EMFILE], ids=errno.errorcode.get
)
@pytest.mark.parametrize("call", ["fsync", "link", "open"])
async def test_row_135_a_disk_that_fails_refuses_and_keeps_what_is_there(
    number: int, call: str, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.publish(Upload.made(0))
    before = stored_keys(tmp_path)
    failing = Failing(number)
    with monkeypatch.context() as broken:
        match call:
            case "fsync":
                broken.setattr(os, "fsync", failing)
            case "link":
                broken.setattr(Path, "replace", failing)
            case _:
                broken.setattr(Path, "open", failing)
        expected = "storage_full" if number == errno.ENOSPC else "store_unavailable"
        assert await reason_of(client.publish(Upload.made(1), key="b")) == expected
    assert failing.num_calls > 0
    assert stored_keys(tmp_path)[: len(before)] == before
    assert await client.download("billing:1", WEIGHTS) == Upload.made(0).weights
    assert await reason_of(client.resolve("billing:2")) == "version_not_found"
    assert (await client.publish(Upload.made(1), key="b")).version == 2


class Failing:
    """A call to the system that fails."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.num_calls = 0

    def __call__(self, *_: object, **__: object) -> object:
        self.num_calls += 1
        raise OSError(self._number, os.strerror(self._number))


class Jumped:
    """The module `time` after the system's clock has jumped."""

    def __init__(self, by_seconds: int) -> None:
        self._by_seconds = by_seconds
        self.monotonic_ns = time.monotonic_ns

    def time(self) -> float:
        return time.time() + self._by_seconds

    def time_ns(self) -> int:
        return time.time_ns() + self._by_seconds * 10**9


@pytest.mark.parametrize("jump_seconds", [3700, -3700], ids=["forward", "back"])
async def test_row_136_a_clock_that_jumps_lets_nothing_expire(
    jump_seconds: int, local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = local.settings()
    host, registry = ServiceHost(settings, SERVICES), Registry(settings)
    await registry.register(host)
    address = await host.start()
    async with open_channel(str(address)) as channel:
        client = Client(channel, "acme")
        await client.call(client.bases.CreateBaseModel, CreateBaseModelRequest(base_model=base_message()))
        version = await client.publish(Upload.made(0))
        lease = AcquireLeaseRequest(digest=version.digest, holder="engine", ttl_seconds=60)
        await client.call(client.adapters.AcquireLease, lease)
        header = file_pb2.CreateFileHeader(filename="a", purpose=file_pb2.FILE_PURPOSE_FINE_TUNE)
        start = file_pb2.StartUploadRequest(header=header, size_bytes=4)
        uploads = [await client.call(client.files.StartUpload, start) for _ in range(3)]
        for module in (clock, collection, directory):
            # Not for the whole process: gRPC's clients take their deadlines from this clock.
            monkeypatch.setattr(module, "time", Jumped(jump_seconds))
        deletion = DeleteVersionRequest(adapter="billing", version=1)
        await client.call(client.adapters.DeleteVersion, deletion)
        collected = await registry.collect(grace_seconds=3600)
        assert (collected.num_blobs, collected.num_uploads) == (0, 0)
        for upload in uploads:
            part = file_pb2.AppendUploadRequest(upload_id=upload.id, offset=0, data=b"data")
            await client.call(client.files.AppendUpload, iter([part]))
            await client.call(
                client.files.CompleteUpload, file_pb2.CompleteUploadRequest(upload_id=upload.id)
            )
        assert (await client.publish(Upload.made(1))).version == 2
    await host.stop(grace_seconds=0)
