"""Versions deleted, moved or evicted under their requests: leases at the registry, rows 40, 41 and 105."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from lorafleet.inference.v1 import inference_service_pb2 as calls
from lorafleet.registry.v1 import adapter_pb2
from services.common.errors import LorafleetError
from services.inference import registry_leases
from services.registry.service import Registry
from tests.support.inference import Fleet, Stream, request, running_fleet
from tests.support.models import make_peft_adapter, make_tiny_llama
from tests.support.registry import Place

LONG = {"max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_peft_adapter(base, root / name, r=4, seed=seed) for seed, name in enumerate("ab")}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_leases, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(registry_leases, "_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(registry_leases, "_LINGER_SECONDS", 0.1)


@pytest.fixture
async def fleet(base: Path, folders: dict[str, Path], tmp_path: Path, redis_url: str) -> AsyncIterator[Fleet]:
    async with running_fleet(base, tmp_path, redis_url) as fleet:
        await fleet.publish({"one": folders["a"]})
        yield fleet


async def holders(redis_url: str, digest: str) -> list[bytes]:
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        found: list[bytes] = await client.zrange(f"lease:registry:version:acme:{digest}", 0, -1)
    return found


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def digest_of(fleet: Fleet, ref: str) -> str:
    return str((await fleet.registry.resolve(ref)).digest)


async def collect(tmp_path: Path, redis_url: str) -> int:
    registry = Registry(Place.in_directory(redis_url, tmp_path / "store").settings())
    try:
        return (await registry.collect(grace_seconds=0)).num_blobs
    finally:
        await registry.close()


async def start(fleet: Fleet, adapter: str) -> asyncio.Task[Stream]:
    task = asyncio.create_task(fleet.client.generate(request("Once", adapter, **LONG)))
    await fleet.client.until(lambda status: status.running > 0)
    return task


async def test_row_40_bytes_in_use_outlive_a_deletion_and_go_with_the_last_request(
    base: Path, folders: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    async with running_fleet(base, tmp_path, redis_url) as fleet:
        await fleet.publish({"one": folders["a"]})
        undisturbed = await fleet.client.generate(request("Once", "one", **LONG))
        digest = await digest_of(fleet, "one")
        await until(lambda: _none(holders(redis_url, digest)))
        running = await start(fleet, "one")
        await until(lambda: holders(redis_url, digest))
        delete = adapter_pb2.DeleteAdapterRequest(adapter="one")
        await fleet.registry.call(fleet.registry.adapters.DeleteAdapter, delete)
        with pytest.raises(LorafleetError) as caught:
            await fleet.client.generate(request("Once", "one"))
        assert caught.value.reason == "adapter_deleted"
        assert (await running).tokens == undisturbed.tokens
        await until(lambda: _none(holders(redis_url, digest)))
    assert await collect(tmp_path, redis_url) == 2


async def _none(found: Any) -> bool:
    return not await found


async def test_pins_lease_what_they_hold(fleet: Fleet, redis_url: str) -> None:
    await fleet.client.call(fleet.client.stub.Pin, calls.PinRequest(adapter="one"))
    digest = await digest_of(fleet, "one")
    await until(lambda: holders(redis_url, digest))
    await fleet.client.call(fleet.client.stub.Unpin, calls.UnpinRequest(adapter="one"))
    await until(lambda: _none(holders(redis_url, digest)))


async def test_leases_are_given_back_at_the_end(
    base: Path, folders: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    async with running_fleet(base, tmp_path, redis_url) as fleet:
        await fleet.publish({"one": folders["a"]})
        await fleet.client.call(fleet.client.stub.Pin, calls.PinRequest(adapter="one"))
        digest = await digest_of(fleet, "one")
        await until(lambda: holders(redis_url, digest))
    assert await holders(redis_url, digest) == []


async def test_leases_are_taken_again_when_the_index_was_emptied(
    fleet: Fleet, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_leases, "TTL_SECONDS", 3)
    await fleet.client.call(fleet.client.stub.Pin, calls.PinRequest(adapter="one"))
    digest = await digest_of(fleet, "one")
    await until(lambda: holders(redis_url, digest))
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        await client.delete(f"lease:registry:version:acme:{digest}")
    await until(lambda: holders(redis_url, digest))


async def test_row_41_running_requests_end_on_the_version_they_began_with(
    fleet: Fleet, folders: dict[str, Path]
) -> None:
    versions = [await digest_of(fleet, "one:1")]
    await fleet.registry.set_alias("prod", 1, adapter="one")
    before = await fleet.client.generate(request("Once", "one@prod", **LONG))
    running = await start(fleet, "one@prod")
    await fleet.publish({"one": folders["b"]})
    versions.append(await digest_of(fleet, "one:2"))
    await fleet.registry.set_alias("prod", 2, adapter="one")
    after = await fleet.client.generate(request("Once", "one@prod", **LONG))
    old = await running
    assert [old.started.version_digest, after.started.version_digest] == versions
    assert [old.started.version_ref, after.started.version_ref] == ["one:1", "one:2"]
    assert old.tokens == before.tokens
    assert after.tokens != before.tokens


async def test_row_105_evict_update_and_delete_do_not_touch_what_runs_or_waits(
    base: Path, folders: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    async with running_fleet(base, tmp_path, redis_url, max_num_seqs=1) as fleet:
        await fleet.publish({"one": folders["a"]})
        undisturbed = await fleet.client.generate(request("Once", "one", **LONG))
        decoding = await start(fleet, "one")
        queued = asyncio.create_task(fleet.client.generate(request("Once", "one", **LONG)))
        await fleet.client.until(lambda status: status.queued == 1)
        with pytest.raises(LorafleetError) as caught:
            await fleet.client.call(fleet.client.stub.Evict, calls.EvictRequest(adapter="one:1"))
        assert caught.value.reason == "adapter_in_use"
        await fleet.publish({"one": folders["b"]})
        newer = asyncio.create_task(fleet.client.generate(request("Once", "one", **LONG)))
        await fleet.client.until(lambda status: status.queued == 2)
        delete = adapter_pb2.DeleteAdapterRequest(adapter="one")
        await fleet.registry.call(fleet.registry.adapters.DeleteAdapter, delete)
        streams = await asyncio.gather(decoding, queued, newer)
        assert [stream.started.version_ref for stream in streams] == ["one:1", "one:1", "one:2"]
        assert streams[0].tokens == streams[1].tokens == undisturbed.tokens
        # The same prompt under the newer version: nothing of the older one's prefix was used.
        assert streams[2].tokens != undisturbed.tokens
        assert (await fleet.client.idle()).preemptions == 0
