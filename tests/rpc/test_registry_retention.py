"""What is kept and for how long: leases, garbage collection, quotas, verification, the one writer."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from lorafleet.registry.v1 import adapter_pb2, file_pb2
from services.common.errors import LorafleetError
from services.common.store import DirectoryStore, open_store
from services.registry.collection import Collected
from services.registry.service import Registry
from services.registry.verification import verify
from tests.support.registry import Client, Place, Upload, reason_of, registry_client, running_registry, sha256
from tests.support.registry_fixtures import WEIGHTS, client, flush, local, place, s3_server, stored_keys

__all__ = ["client", "local", "place", "s3_server"]


async def collect(place: Place, grace_seconds: float = 0) -> Collected:
    registry = Registry(place.settings())
    try:
        return await registry.collect(grace_seconds)
    finally:
        await registry.close()


async def delete(client: Client, adapter: str = "billing") -> None:
    await client.call(client.adapters.DeleteAdapter, adapter_pb2.DeleteAdapterRequest(adapter=adapter))


async def lease(client: Client, digest: str, holder: str = "replica-1", ttl: int = 60) -> adapter_pb2.Lease:
    request = adapter_pb2.AcquireLeaseRequest(digest=digest, holder=holder, ttl_seconds=ttl)
    result: adapter_pb2.Lease = await client.call(client.adapters.AcquireLease, request)
    return result


async def usage(client: Client) -> adapter_pb2.Usage:
    result: adapter_pb2.Usage = await client.call(client.adapters.GetUsage, adapter_pb2.GetUsageRequest())
    return result


async def test_collection_takes_what_nothing_names(place: Place) -> None:
    upload = Upload.made(0)
    async with registry_client(place) as client:
        kept = await client.publish(upload)
        await client.publish(Upload(upload.config, Upload.made(1).weights), adapter="gone")
        file = await client.create_file(b"{}\n")
        await delete(client, "gone")
        await client.call(client.files.DeleteFile, file_pb2.DeleteFileRequest(file_id=file.id))
    assert (await collect(place, grace_seconds=3600)).num_blobs == 0
    # S3 rounds times to whole seconds, up.
    await asyncio.sleep(1.1)
    assert (await collect(place)).num_blobs == 2
    assert (await collect(place)).num_blobs == 0
    async with running_registry(place) as channel:
        client = Client(channel, "acme")
        assert await client.download(f"billing@{kept.digest}", WEIGHTS) == upload.weights
        again = await client.publish(Upload(upload.config, Upload.made(1).weights), adapter="gone")
        assert again.version == 2
        assert await client.download("gone", WEIGHTS) == Upload.made(1).weights


async def test_row_40_a_lease_keeps_the_bytes_of_a_deleted_version(local: Place) -> None:
    async with registry_client(local) as client:
        version = await client.publish(Upload.made(0))
        held = await lease(client, version.digest)
        assert time.time() + 50 < held.expire_time.seconds < time.time() + 70
        await delete(client)
        assert await reason_of(client.resolve("billing")) == "adapter_deleted"
        assert await reason_of(lease(client, version.digest, "replica-2")) == "adapter_deleted"
        assert (await lease(client, version.digest, ttl=90)).expire_time.seconds > held.expire_time.seconds
    assert (await collect(local)).num_blobs == 0
    async with running_registry(local) as channel:
        client = Client(channel, "acme")
        request = adapter_pb2.ReleaseLeaseRequest(digest=version.digest, holder="replica-1")
        await client.call(client.adapters.ReleaseLease, request)
    assert (await collect(local)).num_blobs == 2


async def test_a_lease_ends_by_itself(local: Place) -> None:
    async with registry_client(local) as client:
        version = await client.publish(Upload.made(0))
        await lease(client, version.digest, ttl=1)
        await delete(client)
    await asyncio.sleep(1.1)
    assert (await collect(local)).num_blobs == 2


async def test_bad_leases_are_refused(client: Client) -> None:
    version = await client.publish(Upload.made(0))
    assert await reason_of(lease(client, version.digest, ttl=0)) == "bad_ttl"
    assert await reason_of(lease(client, version.digest, ttl=3601)) == "bad_ttl"
    assert await reason_of(lease(client, version.digest, holder="")) == "bad_holder"
    assert await reason_of(lease(client, version.digest, holder="a\n")) == "bad_holder"
    assert await reason_of(lease(client, "billing")) == "bad_digest"
    assert await reason_of(lease(client, sha256(b"other"))) == "version_not_found"
    assert await reason_of(lease(client.as_tenant("globex"), version.digest)) == "version_not_found"


async def test_collection_refuses_beside_damaged_records(local: Place, tmp_path: Path) -> None:
    async with registry_client(local) as client:
        await client.publish(Upload.made(0))
    [key] = [key for key in stored_keys(tmp_path) if "/versions/" in key]
    DirectoryStore(tmp_path / "objects").put(key, b"{")
    with pytest.raises(LorafleetError) as caught:
        await collect(local)
    assert caught.value.reason == "damaged_records"
    assert sum("blobs/" in key for key in stored_keys(tmp_path)) == 2


async def test_row_34_collection_ends_abandoned_uploads(local: Place, tmp_path: Path) -> None:
    async with registry_client(local, upload_seconds=0.5) as client:
        before = stored_keys(tmp_path)
        header = file_pb2.CreateFileHeader(filename="a", purpose=file_pb2.FILE_PURPOSE_FINE_TUNE)
        request = file_pb2.StartUploadRequest(header=header, size_bytes=10)
        upload = await client.call(client.files.StartUpload, request)
        part = file_pb2.AppendUploadRequest(upload_id=upload.id, offset=0, data=b"12345")
        await client.call(client.files.AppendUpload, iter([part]))
        stray = f"uploads/parts/acme/{upload.id[:-1]}0/000000000000000-5"
        DirectoryStore(tmp_path / "objects").put(stray, b"12345")
    await asyncio.sleep(0.6)
    assert (await collect(local)).num_uploads == 2
    left = [key for key in stored_keys(tmp_path) if not key.startswith("writers/")]
    assert left == [key for key in before if not key.startswith("writers/")]


async def test_usage_counts_what_is_not_deleted(client: Client, local: Place) -> None:
    first, second = Upload.made(0), Upload.made(1)
    for upload in (first, second):
        await client.publish(upload)
    file = await client.create_file(b"12345")
    await client.create_file(b"678")
    await client.call(
        client.adapters.DeleteVersion, adapter_pb2.DeleteVersionRequest(adapter="billing", version=1)
    )
    await client.call(client.files.DeleteFile, file_pb2.DeleteFileRequest(file_id=file.id))
    expected = adapter_pb2.Usage(
        adapter_bytes=len(second.config) + len(second.weights),
        file_bytes=3,
        num_adapters=1,
        num_versions=1,
        num_files=1,
    )
    assert await usage(client) == expected
    await flush(local)
    assert await usage(client) == expected
    assert await usage(client.as_tenant("globex")) == adapter_pb2.Usage()


async def test_a_quota_holds_and_deleting_makes_room(local: Place) -> None:
    upload = Upload.made(0)
    size_bytes = len(upload.config) + len(upload.weights)
    async with registry_client(local, quota_bytes=size_bytes + 10) as client:
        assert (await usage(client)).quota_bytes == size_bytes + 10
        await client.publish(upload)
        for call in (
            client.publish(Upload.made(1)),
            client.create_file(bytes(11)),
            client.call(
                client.files.StartUpload,
                file_pb2.StartUploadRequest(
                    header=file_pb2.CreateFileHeader(filename="a", purpose=file_pb2.FILE_PURPOSE_FINE_TUNE),
                    size_bytes=11,
                ),
            ),
        ):
            assert await reason_of(call) == "quota_exceeded"
        await client.create_file(bytes(10))
        await client.as_tenant("globex").publish(Upload.made(1))
        await delete(client)
        assert (await client.publish(Upload.made(1))).version == 2


async def test_row_39_verify_names_the_damage(local: Place, tmp_path: Path) -> None:
    upload = Upload.made(0)
    async with registry_client(local) as client:
        await client.publish(upload)
        await client.publish(Upload.made(1))
        file = await client.create_file(b"12345")
    objects = open_store(local.store_url)
    assert verify(objects).damages == ()
    assert verify(objects).num_blobs == 4
    hexadecimal = sha256(upload.weights).removeprefix("sha256:")
    objects.put(f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}", bytes(len(upload.weights)))
    hexadecimal = file.digest.removeprefix("sha256:")
    objects.delete(f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}")
    [second] = [key for key in stored_keys(tmp_path) if "/versions/000000002" in key]
    objects.put(second, b"{")
    found = {damage.reason: damage for damage in verify(objects).damages}
    assert set(found) == {"corrupt_record", "corrupt_blob", "missing_blob"}
    assert found["corrupt_blob"].named_by == (f"acme/billing:1/{WEIGHTS}",)
    assert found["missing_blob"].named_by == (f"acme/{file.id}",)
    assert found["corrupt_record"].key == second


async def test_row_35_equal_bytes_are_one_blob(client: Client, tmp_path: Path) -> None:
    upload = Upload.made(0)
    versions = await asyncio.gather(*(client.publish(upload) for _ in range(8)))
    assert sorted(version.version for version in versions) == list(range(1, 9))
    assert sum("blobs/" in key for key in stored_keys(tmp_path)) == 2


async def test_a_second_registry_waits_for_the_first(local: Place) -> None:
    async with registry_client(local) as client:
        await client.publish(Upload.made(0))
        second = Registry(local.settings())
        with pytest.raises(LorafleetError) as caught:
            await second.probe()
        assert caught.value.reason == "not_the_writer"
        assert caught.value.metadata["pid"] == str(os.getpid())
        with pytest.raises(LorafleetError, match="not_the_writer"):
            await second.collect(0)
        assert (await client.publish(Upload.made(1))).version == 2
    await second.probe()
    assert await second.reindex() == 3
    await second.close()


async def test_registries_with_two_indexes_do_not_share_a_store(
    local: Place, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.registry.writer.RENEW_SECONDS", 0.0)
    other = Place(redis_url.removesuffix("/0") + "/1", local.store_url)
    async with registry_client(local) as client:
        await client.publish(Upload.made(0))
        async with running_registry(other) as channel:
            assert (await Client(channel, "acme").publish(Upload.made(1))).version == 2
            assert await reason_of(client.publish(Upload.made(2))) == "not_the_writer"
            assert await reason_of(client.resolve("billing")) == "not_the_writer"
