"""Loads that are many, slow, cut or hopeless: who waits, who fails, what is counted: rows 104, 127 to 129."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafleet.inference.v1 import inference_service_pb2 as calls
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from lorafleet.registry.v1 import adapter_pb2
from services.common.channels import open_channel
from services.common.errors import Code, LorafleetError
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.inference import (
    TENANT,
    Fleet,
    InferenceClient,
    request,
    running_fleet,
    running_inference,
    running_registry,
    settings_for,
    until_served,
)
from tests.support.metric_reader import start_reading, total
from tests.support.models import make_peft_adapter, make_tiny_llama
from tests.support.registry import Client, Place, reason_of

COUNT = 64
RANKS = (2, 4, 8, 16)
WEIGHTS = "adapter_model.safetensors"
STAGES = "lorafleet.inference.adapter.load_stage.duration"
LOADS = "lorafleet.inference.adapter.loads"
BYTES = "lorafleet.inference.adapter.bytes"
WAITS = "lorafleet.inference.adapter.wait.duration"
REQUESTS = "lorafleet.inference.adapter.requests"


@pytest.fixture(autouse=True)
def reading() -> None:
    start_reading()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """64 adapters of 4 ranks: one of each rank made by PEFT, the others with its tensors drawn anew."""
    root = tmp_path_factory.mktemp("adapters")
    models = [make_peft_adapter(base, root / f"rank{rank}", r=rank, seed=rank) for rank in RANKS]
    found = {}
    for number in range(COUNT):
        model, folder = models[number % len(models)], root / f"a{number}"
        shutil.copytree(model, folder)
        generator = torch.Generator().manual_seed(number)
        tensors = load_file(model / WEIGHTS)
        drawn = {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in tensors.items()}
        save_file(drawn, folder / WEIGHTS)
        found[f"a{number}"] = folder
    return found


@asynccontextmanager
async def fleet_behind_a_proxy(
    base: Path, folder: Path, redis_url: str, **changes: Any
) -> AsyncIterator[tuple[Fleet, FaultProxy]]:
    """Run both services; inference reaches the registry through a proxy that can be told to misbehave."""
    async with AsyncExitStack() as stack:
        place = Place.in_directory(redis_url, folder / "store")
        registry_address, stop = await stack.enter_async_context(running_registry(place))
        host, _, port = registry_address.rpartition(":")
        proxy = await stack.enter_async_context(fault_proxy(host, int(port)))
        settings = settings_for(base, folder / "cache", f"127.0.0.1:{proxy.port}", **changes)
        service, address = await stack.enter_async_context(running_inference(settings))
        channel = await stack.enter_async_context(open_channel(address))
        registry_channel = await stack.enter_async_context(open_channel(registry_address))
        client = InferenceClient(InferenceServiceStub(channel))
        digest = await until_served(client)
        registry = Client(registry_channel, TENANT)
        yield Fleet(client, registry, registry_address, service, address, digest, stop), proxy


def damage(store: Path, version: adapter_pb2.AdapterVersion) -> None:
    """Flip a bit of the stored weights."""
    (digest,) = [file.digest for file in version.files if file.name == WEIGHTS]
    (blob,) = [path for path in store.rglob("*") if digest.removeprefix("sha256:") in path.name]
    blob.chmod(0o600)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)


async def test_row_104_one_of_64_adapters_fails_and_63_answer_as_alone(
    base: Path, folders: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    failed = {"error.type": "corrupt_blob"}
    before = total(LOADS, failed)
    async with running_fleet(base, tmp_path, redis_url, max_num_seqs=COUNT) as fleet:
        published = await fleet.publish(folders)
        damage(tmp_path / "store", published["a13"])
        results = await asyncio.gather(
            *(fleet.client.generate(request("Hello", name)) for name in folders), return_exceptions=True
        )
        for name, result in zip(folders, results, strict=True):
            if name == "a13":
                assert isinstance(result, LorafleetError)
                assert (result.code, result.reason) == (Code.DATA_LOSS, "corrupt_blob")
            else:
                assert not isinstance(result, BaseException), result
                alone = await fleet.client.generate(request("Hello", name))
                assert result.tokens == alone.tokens
        await fleet.client.idle()
        listed = await fleet.client.residents()
        assert listed["a13:1"].tier == calls.TIER_FAILED
        assert len(listed) == COUNT
        assert all(item.leases == 0 for item in listed.values())
    assert total(LOADS, failed) == before + 1


async def test_row_127_store_away_fails_cold_loads_only_and_they_work_when_it_is_back(
    base: Path, folders: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    async with fleet_behind_a_proxy(base, tmp_path, redis_url, adapter_failure_seconds=0.5) as (fleet, proxy):
        few = {name: folders[name] for name in ("a0", "a1")}
        await fleet.publish(few)
        warm = await fleet.client.generate(request("Hello", "a0"))
        running = asyncio.create_task(
            fleet.client.generate(request("Hello", "a0", max_tokens=400, ignore_eos=True))
        )
        await proxy.stop()
        started = time.monotonic()
        with pytest.raises(LorafleetError) as caught:
            await fleet.client.generate(request("Hello", "a1"))
        assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "adapter_unavailable")
        assert caught.value.retry_after_seconds
        assert time.monotonic() - started < 10
        assert (await fleet.client.generate(request("Hello", "a0"))).tokens == warm.tokens
        assert len((await running).tokens) == 400
        await proxy.start()
        deadline = time.monotonic() + 20
        while (reason := await reason_of(fleet.client.generate(request("Hello", "a1")))) != "no error":
            assert reason == "adapter_unavailable"
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        await fleet.client.idle()


async def test_row_128_slow_store_holds_up_its_own_requests_only(
    base: Path, folders: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    """There are more slow loads than threads to download."""
    async with fleet_behind_a_proxy(base, tmp_path, redis_url, download_threads=2) as (fleet, proxy):
        names = [f"a{number}" for number in range(10)]
        await fleet.publish({name: folders[name] for name in names})
        for name in ("a0", "a1"):
            await fleet.client.generate(request("Hello", f"{name}:1"))
        cold = asyncio.gather(*(fleet.client.generate(request("Hello", name)) for name in names[2:]))
        proxy.latency_seconds = 0.5
        await fleet.client.until(lambda status: status.waiting_for_adapter >= 1)
        started = time.monotonic()
        await fleet.client.generate(request("Hello", "a0:1"))
        await fleet.client.generate(request("Hello", "a1:1"))
        warm_seconds = time.monotonic() - started
        assert not cold.done()
        proxy.latency_seconds = 0.0
        await cold
        assert warm_seconds < 2.0
        await fleet.client.idle()


async def test_row_129_cut_in_the_middle_of_a_blob_goes_on_by_range(
    base: Path, tmp_path: Path, redis_url: str
) -> None:
    # 64 x (128 + 96) x 2 x 4 bytes: longer than what is sent before the cuts.
    wide = make_peft_adapter(base, tmp_path / "wide", r=32, targets="all-linear", seed=3)
    async with fleet_behind_a_proxy(base, tmp_path, redis_url) as (fleet, proxy):
        await fleet.publish({"wide": wide})
        await fleet.client.generate(request("Hello"))
        proxy.cut_after_bytes, proxy.num_cuts_left = 40_000, 2
        answer = await fleet.client.generate(request("Hello", "wide"))
        assert proxy.num_cuts_left == 0
        await fleet.client.call(fleet.client.stub.Evict, calls.EvictRequest(adapter="wide"))
        assert (await fleet.client.generate(request("Hello", "wide"))).tokens == answer.tokens


async def test_loads_are_measured_by_stage_and_requests_by_adapter(
    base: Path, folders: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    stages = {stage: total(STAGES, {"stage": stage}) for stage in ("download", "verify", "parse", "copy")}
    waits = total(WAITS, {})
    held = {tier: total(BYTES, {"tier": tier}) for tier in ("disk", "host", "device")}
    async with running_fleet(base, tmp_path, redis_url) as fleet:
        published = await fleet.publish({"a0": folders["a0"], "a1": folders["a1"]})
        asked = {
            result: total(REQUESTS, {"adapter": published["a0"].digest, "result": result})
            for result in ("miss", "hit")
        }
        for name in ("a0", "a1", "a0", "a0"):
            await fleet.client.generate(request("Hello", name))
        status = await fleet.client.status()
    used = (status.adapters_disk, status.adapters_host, status.adapters_device)
    for (tier, before), usage in zip(held.items(), used, strict=True):
        assert total(BYTES, {"tier": tier}) - before == usage.used_bytes > 0
    grown = {stage: total(STAGES, {"stage": stage}) - before for stage, before in stages.items()}
    # Nothing is copied on a CPU.
    assert grown == {"download": 2, "verify": 2, "parse": 2, "copy": 0}
    assert total(WAITS, {}) == waits + 2
    for result, wanted in (("miss", 1), ("hit", 2)):
        attributes = {"adapter": published["a0"].digest, "result": result}
        assert total(REQUESTS, attributes) - asked[result] == wanted
