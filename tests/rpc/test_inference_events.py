"""Prefetching on what the registry tells: only by opt-in, for the named tenants, and after an outage too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lorafleet.inference.v1 import inference_service_pb2 as calls
from services.inference import event_prefetch
from tests.support.inference import Fleet, publish, request, running_fleet, running_registry
from tests.support.models import make_peft_adapter, make_tiny_llama
from tests.support.registry import Place


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_peft_adapter(base, root / name, r=4, seed=seed) for seed, name in enumerate("abc")}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_prefetch, "_FIRST_PAUSE_SECONDS", 0.05)


StartFleet = Callable[..., Any]


@pytest.fixture
def start(base: Path, folders: dict[str, Path], tmp_path: Path, redis_url: str) -> StartFleet:
    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[Fleet]:
        async with running_fleet(base, tmp_path, redis_url, **settings) as fleet:
            await fleet.publish({"one": folders["a"], "two": folders["b"]})
            # A watch that began before hears of these too; what counts is what comes from here on.
            await asyncio.sleep(0.3)
            yield fleet

    return start


async def until_resident(fleet: Fleet, ref: str) -> calls.ResidentAdapter:
    deadline = time.monotonic() + 10
    while ref not in (listed := await fleet.client.residents()) or listed[ref].tier < calls.TIER_HOST:
        assert time.monotonic() < deadline, listed
        await asyncio.sleep(0.02)
    return listed[ref]


async def test_nothing_is_prefetched_without_opt_in(start: StartFleet, folders: dict[str, Path]) -> None:
    async with start() as fleet:
        await fleet.client.generate(request(adapter="one"))
        await fleet.publish({"one": folders["c"]})
        await fleet.registry.set_alias("prod", 1, adapter="two")
        await asyncio.sleep(0.5)
        assert (await fleet.client.residents()).keys() == {"one:1"}


async def test_version_is_there_before_the_alias_is_used(start: StartFleet) -> None:
    async with start(prefetch_tenants=("acme",), prefetch_aliases=("prod",)) as fleet:
        await fleet.registry.set_alias("staging", 1, adapter="one")
        await fleet.registry.set_alias("prod", 1, adapter="two")
        resident = await until_resident(fleet, "two:1")
        assert resident.tier == calls.TIER_HOST
        await fleet.client.idle()
        assert (await fleet.client.residents()).keys() == {"two:1"}


async def test_new_versions_of_resident_adapters_only(start: StartFleet, folders: dict[str, Path]) -> None:
    async with start(prefetch_tenants=("acme",), prefetch_new_versions=True) as fleet:
        await fleet.client.generate(request(adapter="one"))
        await publish(fleet.registry.as_tenant("globex"), "one", folders["b"], fleet.base_digest)
        await fleet.publish({"two": folders["c"]})
        await fleet.publish({"one": folders["c"]})
        await until_resident(fleet, "one:2")
        assert (await fleet.client.residents()).keys() == {"one:1", "one:2"}
        assert await fleet.as_tenant("globex").residents() == {}


async def test_move_that_was_missed_is_made_up_for(start: StartFleet, tmp_path: Path, redis_url: str) -> None:
    async with start(prefetch_tenants=("acme",), prefetch_aliases=("prod",)) as fleet:
        await fleet.registry.set_alias("prod", 1, adapter="one")
        await until_resident(fleet, "one:1")
        await fleet.stop_registry()
        place = Place.in_directory(redis_url, tmp_path / "store")
        async with running_registry(place, listen=fleet.registry_address):
            await fleet.registry.set_alias("prod", 1, adapter="two")
            await until_resident(fleet, "two:1")
