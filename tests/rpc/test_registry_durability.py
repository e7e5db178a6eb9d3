"""Nothing that was acknowledged is lost: flushed and stale indexes, restarts, races, damaged records."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import redis.asyncio

from lorafleet.registry.v1 import adapter_pb2
from services.common.store import DirectoryStore
from tests.support.registry import (
    Client,
    Place,
    Upload,
    reason_of,
    registry_client,
    running_registry,
    sha256,
)
from tests.support.registry_fixtures import (
    WEIGHTS,
    client,
    flush,
    local,
    place,
    s3_server,
    stored_keys,
)

__all__ = ["client", "local", "place", "s3_server"]


async def everything(client: Client) -> list[Any]:
    """All that the tenant can list."""
    stub = client.adapters
    found: list[Any] = [await client.call(stub.ListAdapters, adapter_pb2.ListAdaptersRequest())]
    for adapter in found[0].adapters:
        request = adapter_pb2.ListVersionsRequest(adapter=adapter.name, include_deleted=True)
        found.append(await client.call(stub.ListVersions, request))
        found.append(await client.call(stub.GetAdapter, adapter_pb2.GetAdapterRequest(adapter=adapter.name)))
        for alias in adapter.aliases:
            history = adapter_pb2.ListAliasHistoryRequest(adapter=adapter.name, alias=alias.name)
            found.append(await client.call(stub.ListAliasHistory, history))
    found.append(await client.call(stub.ListAliases, adapter_pb2.ListAliasesRequest()))
    return found


async def populate(client: Client) -> None:
    """Two adapters, four versions, one of them deleted, two aliases, one of them deleted."""
    for seed in range(3):
        await client.publish(Upload.made(seed), key=f"key-{seed}", description=f"number {seed}", seed=seed)
    await client.publish(Upload.made(9), adapter="sorting")
    await client.set_alias("prod", 1)
    await client.set_alias("prod", 2)
    await client.set_alias("old", 1)
    await client.call(
        client.adapters.DeleteAlias, adapter_pb2.DeleteAliasRequest(adapter="billing", alias="old")
    )
    await client.call(
        client.adapters.DeleteVersion, adapter_pb2.DeleteVersionRequest(adapter="billing", version=3)
    )


async def test_everything_survives_a_flushed_index_and_a_restart(place: Place) -> None:
    async with registry_client(place) as client:
        await populate(client)
        before = await everything(client)
        await flush(place)
        assert await everything(client) == before
        again = await client.publish(Upload.made(1), key="key-1", description="number 1", seed=1)
        assert again.version == 2
        await flush(place)
        assert (await client.publish(Upload.made(5))).version == 4
        before = await everything(client)
    await flush(place)
    async with running_registry(place) as channel:
        client = Client(channel, "acme")
        assert await everything(client) == before
        assert (await client.publish(Upload.made(6))).version == 5
        before = await everything(client)
    async with running_registry(place) as channel:
        assert await everything(Client(channel, "acme")) == before


async def test_racing_publishers_get_a_version_each(place: Place) -> None:
    async with registry_client(place) as client:
        published = await asyncio.gather(*(client.publish(Upload.made(seed)) for seed in range(16)))
        assert sorted(version.version for version in published) == list(range(1, 17))
        for seed, version in enumerate(published):
            ref = f"billing:{version.version}"
            assert await client.download(ref, WEIGHTS) == Upload.made(seed).weights


async def test_flush_amid_racing_publishers_loses_nothing(client: Client, local: Place) -> None:
    async def flush_often() -> None:
        for _ in range(20):
            await flush(local)
            await asyncio.sleep(0.01)

    tasks = [client.publish(Upload.made(seed), key=f"k{seed}") for seed in range(12)]
    published, _ = await asyncio.gather(asyncio.gather(*tasks), flush_often())
    assert sorted(version.version for version in published) == list(range(1, 13))
    for version in published:
        assert (await client.resolve(f"billing:{version.version}")).digest == version.digest


async def test_an_index_set_back_to_an_older_state_is_noticed(client: Client, local: Place) -> None:
    await client.publish(Upload.made(0))
    async with redis.asyncio.Redis.from_url(local.redis_url) as index:
        dumps = {key: await index.dump(key) async for key in index.scan_iter("*")}
        await client.publish(Upload.made(1))
        await index.flushall()
        for key, value in dumps.items():
            assert value is not None
            await index.restore(key, 0, value)
    assert (await client.resolve("billing")).version == 2


async def test_a_record_that_missed_the_index_is_found_at_the_start(local: Place, tmp_path: Path) -> None:
    async with registry_client(local) as client:
        await client.publish(Upload.made(0))
    store = DirectoryStore(tmp_path / "objects")
    [key] = [key for key in stored_keys(tmp_path) if "/versions/" in key]
    second = store.get(key).replace(b'"version":1', b'"version":2')
    store.put("tenants/acme/adapters/billing/versions/000000002-x.json", second)
    async with running_registry(local) as channel:
        assert (await Client(channel, "acme").resolve("billing")).version == 2


async def test_two_records_of_one_number_are_both_kept(local: Place, tmp_path: Path) -> None:
    async with registry_client(local) as client:
        for seed in range(2):
            await client.publish(Upload.made(seed))
    store = DirectoryStore(tmp_path / "objects")
    key = next(key for key in stored_keys(tmp_path) if "/versions/000000001" in key)
    double = store.get(key).replace(sha256(Upload.made(0).weights).encode(), b"sha256:" + b"0" * 64)
    store.put("tenants/acme/adapters/billing/versions/000000001-zzz.json", double)
    for _ in range(2):
        await flush(local)
        async with running_registry(local) as channel:
            client = Client(channel, "acme")
            assert await client.download("billing:1", WEIGHTS) == Upload.made(0).weights
            assert (await client.resolve("billing:2")).version == 2
            assert (await client.resolve("billing:3")).files[1].digest == "sha256:" + "0" * 64
            assert await reason_of(client.resolve("billing:4")) == "version_not_found"


async def test_a_damaged_record_hides_only_itself(local: Place, tmp_path: Path) -> None:
    async with registry_client(local) as client:
        for seed in range(2):
            await client.publish(Upload.made(seed))
    key = next(key for key in stored_keys(tmp_path) if "/versions/000000002" in key)
    DirectoryStore(tmp_path / "objects").put(key, b'{"version":')
    await flush(local)
    async with running_registry(local) as channel:
        client = Client(channel, "acme")
        assert (await client.resolve("billing")).version == 1
        assert await reason_of(client.resolve("billing:2")) == "version_not_found"
        assert (await client.publish(Upload.made(2))).version == 3
