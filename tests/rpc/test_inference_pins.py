"""Pin, Unpin, Evict and ListResident at the door: budgets, tenants, deletions and restarts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lorafleet.inference.v1 import inference_service_pb2 as calls
from lorafleet.registry.v1 import adapter_pb2
from services.common.errors import Code, LorafleetError
from tests.support.inference import (
    Fleet,
    InferenceClient,
    publish,
    request,
    running_fleet,
)
from tests.support.models import make_peft_adapter, make_tiny_llama

# q_proj is 64 by 64, v_proj 32 by 64; two layers, rank 4, float32.
SIZE_BYTES = 4 * (128 + 96) * 2 * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_peft_adapter(base, folder / name, r=4, seed=seed)
        for seed, name in enumerate(("one", "two", "three"))
    }


BUDGETS = {"adapter_device_bytes": 2 * SIZE_BYTES, "device_own_share": 1.0}


@pytest.fixture
async def fleet(
    base: Path, adapters: dict[str, Path], tmp_path: Path, redis_url: str
) -> AsyncIterator[Fleet]:
    async with running_fleet(base, tmp_path, redis_url, **BUDGETS) as fleet:
        await fleet.publish(adapters)
        yield fleet


async def pin(client: InferenceClient, ref: str) -> calls.ResidentAdapter:
    result: calls.ResidentAdapter = await client.call(client.stub.Pin, calls.PinRequest(adapter=ref))
    return result


async def unpin(client: InferenceClient, ref: str) -> calls.ResidentAdapter:
    result: calls.ResidentAdapter = await client.call(client.stub.Unpin, calls.UnpinRequest(adapter=ref))
    return result


async def evict(client: InferenceClient, ref: str) -> None:
    await client.call(client.stub.Evict, calls.EvictRequest(adapter=ref))


async def reason_of(work: Any) -> tuple[Code, str]:
    with pytest.raises(LorafleetError) as caught:
        await work
    return caught.value.code, caught.value.reason


async def resident(client: InferenceClient, ref: str) -> calls.ResidentAdapter:
    return (await client.residents())[ref]


async def test_pinned_adapter_stays_on_the_device_while_others_come_and_go(fleet: Fleet) -> None:
    pinned = await pin(fleet.client, "one")
    assert (pinned.version_ref, pinned.tier, pinned.pinned) == ("one:1", calls.TIER_DEVICE, True)
    assert (pinned.device_bytes, pinned.leases) == (SIZE_BYTES, 0)
    for name in ("two", "three", "two"):
        await fleet.client.generate(request(adapter=name))
    assert (await resident(fleet.client, "one:1")).tier == calls.TIER_DEVICE
    assert await reason_of(evict(fleet.client, "one")) == (Code.FAILED_PRECONDITION, "adapter_in_use")
    assert await reason_of(pin(fleet.client, "two")) == (Code.RESOURCE_EXHAUSTED, "pin_budget_exceeded")
    assert not (await resident(fleet.client, "two:1")).pinned
    assert (await pin(fleet.client, "one")).pinned
    assert not (await unpin(fleet.client, "one")).pinned
    assert (await pin(fleet.client, "two")).pinned
    await evict(fleet.client, "one")
    assert "one:1" not in await fleet.client.residents()


async def test_other_tenants_adapters_are_unknown(fleet: Fleet) -> None:
    await pin(fleet.client, "one")
    stranger = fleet.as_tenant("globex")
    assert await stranger.residents() == {}
    prefetch = stranger.call(stranger.stub.Prefetch, calls.PrefetchRequest(adapter="one"))
    for work in (pin(stranger, "one"), unpin(stranger, "one"), evict(stranger, "one"), prefetch):
        assert await reason_of(work) == (Code.NOT_FOUND, "adapter_not_found")
    digest = (await resident(fleet.client, "one:1")).digest
    assert (await reason_of(unpin(stranger, f"one@{digest}")))[0] == Code.NOT_FOUND
    assert (await resident(fleet.client, "one:1")).pinned


async def test_same_bytes_of_two_tenants_are_pinned_by_each(fleet: Fleet, adapters: dict[str, Path]) -> None:
    await publish(fleet.registry.as_tenant("globex"), "theirs", adapters["one"], fleet.base_digest)
    other = fleet.as_tenant("globex")
    ours, theirs = await pin(fleet.client, "one"), await pin(other, "theirs")
    assert ours.digest == theirs.digest
    assert (await other.residents()).keys() == {"theirs:1"}
    assert (await fleet.client.residents()).keys() == {"one:1"}
    await unpin(fleet.client, "one")
    assert not (await resident(fleet.client, "one:1")).pinned
    assert (await resident(other, "theirs:1")).pinned
    assert (await reason_of(evict(fleet.client, "one")))[1] == "adapter_in_use"
    await unpin(other, "theirs")
    await evict(fleet.client, "one")


async def test_deleted_version_can_be_unpinned_and_evicted(fleet: Fleet) -> None:
    await pin(fleet.client, "one")
    delete = adapter_pb2.DeleteAdapterRequest(adapter="one")
    await fleet.registry.call(fleet.registry.adapters.DeleteAdapter, delete)
    assert (await reason_of(fleet.client.generate(request(adapter="one"))))[1] == "adapter_deleted"
    assert (await resident(fleet.client, "one:1")).pinned
    assert (await reason_of(unpin(fleet.client, "one")))[1] == "adapter_deleted"
    await unpin(fleet.client, "one:1")
    await evict(fleet.client, "one:1")
    assert await fleet.client.residents() == {}


async def test_pins_survive_a_restart_without_the_registry(
    base: Path, adapters: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    async with running_fleet(base, tmp_path, redis_url, **BUDGETS) as fleet:
        await fleet.publish(adapters)
        await pin(fleet.client, "two")
    async with running_fleet(base, tmp_path, redis_url, **BUDGETS) as fleet:
        deadline = time.monotonic() + 10
        while (again := await resident(fleet.client, "two:1")).tier != calls.TIER_DEVICE:
            assert time.monotonic() < deadline, again
            await asyncio.sleep(0.02)
        assert (again.pinned, again.leases) == (True, 0)
        await unpin(fleet.client, "two")
    async with running_fleet(base, tmp_path, redis_url, **BUDGETS) as fleet:
        await asyncio.sleep(0.3)
        after = await resident(fleet.client, "two:1")
        assert (after.tier, after.pinned) == (calls.TIER_DISK, False)


async def test_list_names_every_tier(fleet: Fleet) -> None:
    await pin(fleet.client, "one")
    await fleet.client.call(fleet.client.stub.Prefetch, calls.PrefetchRequest(adapter="two"))
    listed = await fleet.client.residents()
    assert {ref: item.tier for ref, item in listed.items()} == {
        "one:1": calls.TIER_DEVICE,
        "two:1": calls.TIER_HOST,
    }
    for item in listed.values():
        assert item.host_bytes == SIZE_BYTES
        assert item.disk_bytes > 0
        assert item.max_rank == 4
        assert abs(item.last_use_time.seconds - time.time()) < 30
