"""Adapters that an operator keeps on the device, and the record that outlives a restart."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.common.errors import ResourceExhausted
from services.inference.adapters.cache import AdapterCache, CacheBudget
from services.inference.adapters.device_budget import DeviceBudget
from services.inference.adapters.disk import DiskTier
from services.inference.adapters.lease import Lease
from services.inference.adapters.slots import DeviceSlots
from services.inference.adapters.targets import LoraTargets
from services.inference.model.linear import install_lora
from services.inference.pins import PinRecord
from services.inference.sources import AdapterSource, SourceFile
from tests.support.engines import FolderFetcher, digest_of
from tests.support.models import make_peft_adapter, make_tiny_llama

NAMES = ("a", "b", "c", "d")
# q_proj is 64 by 64, v_proj 32 by 64; two layers, rank 4, float32.
SIZE_BYTES = 4 * (128 + 96) * 2 * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def targets(base: Path) -> LoraTargets:
    return install_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))[1]


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_peft_adapter(base, root / name, r=4, seed=ord(name)) for name in NAMES}


MakeCache = Callable[..., AdapterCache]


@pytest.fixture
def make_cache(folders: dict[str, Path], targets: LoraTargets, tmp_path: Path) -> Iterator[MakeCache]:
    made: list[AdapterCache] = []

    def make(
        *, device: int = 3, host: int = 8, kept: int = 2, budget: DeviceBudget | None = None
    ) -> AdapterCache:
        made.append(
            AdapterCache(
                FolderFetcher(folders),
                DiskTier(tmp_path / "disk", 1 << 24),
                DeviceSlots(torch.device("cpu"), budget or DeviceBudget(0, device * SIZE_BYTES)),
                targets,
                torch.float32,
                CacheBudget(host * SIZE_BYTES, kept_bytes=kept * SIZE_BYTES),
            )
        )
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def loaded(cache: AdapterCache, name: str) -> Lease:
    lease = cache.acquire(digest_of(name))
    deadline = time.monotonic() + 20
    while not lease.ready:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return lease


def keep(cache: AdapterCache, name: str) -> None:
    lease = loaded(cache, name)
    cache.keep(lease.digest)
    lease.release()


def test_what_is_kept_stays_on_the_device_whatever_comes(make_cache: MakeCache) -> None:
    cache = make_cache(device=2, host=3, kept=1)
    keep(cache, "a")
    assert cache.is_on_device(digest_of("a"))
    for name in ("b", "c", "d", "b", "c"):
        lease = loaded(cache, name)
        assert lease.pin() is not None
        lease.unpin()
        lease.release()
        assert cache.is_on_device(digest_of("a"))
    assert not cache.evict(digest_of("a"))
    assert cache.let_go(digest_of("a"))
    assert not cache.let_go(digest_of("a"))
    assert cache.evict(digest_of("a"))


def test_pins_take_no_more_than_their_share(make_cache: MakeCache) -> None:
    cache = make_cache(device=4, kept=2)
    keep(cache, "a")
    keep(cache, "b")
    keep(cache, "b")
    with pytest.raises(ResourceExhausted) as caught:
        keep(cache, "c")
    assert caught.value.reason == "pin_budget_exceeded"
    cache.let_go(digest_of("a"))
    keep(cache, "c")


def test_a_pin_is_refused_that_would_leave_a_request_without_room_for_ever(make_cache: MakeCache) -> None:
    cache = make_cache(device=2, kept=2)
    held = loaded(cache, "b")
    keep(cache, "a")
    with pytest.raises(ResourceExhausted):
        keep(cache, "c")
    held.release()
    keep(cache, "c")
    # Nothing else fits now, and that is said at once.
    lease = cache.acquire(digest_of("d"))
    deadline = time.monotonic() + 20
    while lease.error is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert lease.error.reason == "adapter_too_large"


def test_a_full_device_makes_room_for_what_is_kept_before_all_others(make_cache: MakeCache) -> None:
    cache = make_cache(device=2, kept=1)
    running = [loaded(cache, name) for name in ("a", "b")]
    assert all(lease.pin() is not None for lease in running)
    keep(cache, "c")
    assert not cache.is_on_device(digest_of("c")), "sequences run on all of the device"
    other = loaded(cache, "d")
    running[0].unpin()
    assert cache.is_on_device(digest_of("c"))
    assert other.pin() is None
    running[1].unpin()
    assert other.pin() is not None
    assert cache.is_on_device(digest_of("c"))


def test_the_kv_cache_gets_idle_adapters_but_not_kept_ones(make_cache: MakeCache) -> None:
    budget = DeviceBudget(0, 3 * SIZE_BYTES)
    cache = make_cache(budget=budget, kept=1)
    keep(cache, "a")
    for name in ("b", "c"):
        lease = loaded(cache, name)
        assert lease.pin() is not None
        lease.unpin()
        lease.release()
    cache.acquire(digest_of("b")).release()
    holder = budget.adapters
    assert holder is not None
    assert holder.idle_bytes() == 2 * SIZE_BYTES
    worth = holder.idle_worth()
    assert worth is not None
    assert worth > 0
    assert holder.free_idle()
    assert not cache.is_on_device(digest_of("c")), "the less wanted one goes first"
    assert holder.free_idle()
    assert not holder.free_idle()
    assert holder.idle_worth() is None
    assert cache.is_on_device(digest_of("a"))


def source(name: str, tenant: str = "acme") -> AdapterSource:
    digest = digest_of(name)
    files = {"adapter_config.json": SourceFile(digest_of("config"), 10)}
    return AdapterSource(tenant, digest, f"{name}@{digest}", f"{name}:1", 4, files)


def test_pins_survive_in_their_file(tmp_path: Path) -> None:
    path = tmp_path / "pins.json"
    record = PinRecord(path, "sha256:base")
    for pinned in (source("a"), source("a", "globex"), source("b")):
        record.add(pinned)
    assert record.remove(source("a")), "the other tenant still pins the same bytes"
    assert not record.remove(source("b"))
    again = PinRecord(path, "sha256:base")
    assert again.sources() == [source("a", "globex")]
    assert (source("a") in again, source("a", "globex") in again) == (False, True)


def test_pins_of_another_base_are_kept_but_not_seen(tmp_path: Path) -> None:
    path = tmp_path / "pins.json"
    PinRecord(path, "sha256:one").add(source("a"))
    other = PinRecord(path, "sha256:two")
    assert other.sources() == []
    other.add(source("b"))
    assert PinRecord(path, "sha256:one").sources() == [source("a")]


@pytest.mark.parametrize("text", ["", "{", "3", '[{"source": 1, "base": "b"}]', '[{"base": "b"}]'])
def test_a_damaged_record_is_moved_aside(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pins.json"
    path.write_text(text)
    record = PinRecord(path, "sha256:base")
    assert record.sources() == []
    assert path.with_suffix(".damaged").read_text() == text
    record.add(source("a"))
    assert len(json.loads(path.read_text())) == 1


def test_a_pin_that_could_not_be_written_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    record = PinRecord(folder / "pins.json", "sha256:base")
    folder.rmdir()
    with pytest.raises(FileNotFoundError):
        record.add(source("a"))
    assert source("a") not in record
