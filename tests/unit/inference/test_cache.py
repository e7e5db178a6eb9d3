"""The adapter tiers: leases, budgets, eviction, failures, and loads that wait for nobody."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.common.errors import LorafleetError, NotFound, Unavailable
from services.inference.adapters.cache import AdapterCache, CacheBudget
from services.inference.adapters.device_budget import DeviceBudget
from services.inference.adapters.disk import DiskTier
from services.inference.adapters.entry import AdapterState
from services.inference.adapters.lease import Lease
from services.inference.adapters.slots import DeviceSlots
from services.inference.adapters.targets import LoraTargets
from services.inference.model.linear import install_lora
from tests.support.engines import FolderFetcher, digest_of
from tests.support.models import make_peft_adapter, make_tiny_llama

NAMES = ("a4", "b4", "e4", "c8", "d16")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def targets(base: Path) -> LoraTargets:
    return install_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))[1]


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_peft_adapter(base, root / name, r=int(name[1:]), seed=ord(name[0])) for name in NAMES}


@pytest.fixture
def fetcher(folders: dict[str, Path]) -> FolderFetcher:
    return FolderFetcher(folders)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


MakeCache = Callable[..., AdapterCache]


@pytest.fixture
def make_cache(
    fetcher: FolderFetcher, clock: Clock, targets: LoraTargets, tmp_path: Path
) -> Iterator[MakeCache]:
    made: list[AdapterCache] = []

    def make(
        *, host_bytes: int = 1 << 20, device_bytes: int = 1 << 20, disk_bytes: int = 1 << 24
    ) -> AdapterCache:
        made.append(
            AdapterCache(
                fetcher,
                DiskTier(tmp_path / "disk", disk_bytes),
                DeviceSlots(torch.device("cpu"), DeviceBudget(0, device_bytes)),
                targets,
                torch.float32,
                CacheBudget(host_bytes, loader_threads=2, failure_seconds=10.0),
                clock=clock,
            )
        )
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def loaded(cache: AdapterCache, name: str) -> Lease:
    lease = cache.acquire(digest_of(name))
    wait_for(lambda: lease.ready)
    return lease


def on_device(cache: AdapterCache) -> set[str]:
    return {entry.digest for entry in cache.residency() if entry.state is AdapterState.DEVICE}


def size_of(folders: dict[str, Path], name: str) -> int:
    """Bytes of float32 at the true rank: q_proj is 64 by 64, v_proj 32 by 64, and there are two layers."""
    return int(name[1:]) * (128 + 96) * 2 * 4


def test_asking_twice_fetches_once(make_cache: MakeCache, fetcher: FolderFetcher) -> None:
    cache = make_cache()
    fetcher.delay_seconds[digest_of("a4")] = 0.1
    leases = [cache.acquire(digest_of("a4")) for _ in range(5)]
    assert not any(lease.ready for lease in leases)
    wait_for(lambda: all(lease.ready for lease in leases))
    assert fetcher.fetches == [digest_of("a4")]
    (entry,) = cache.residency()
    assert (entry.state, entry.leases) == (AdapterState.HOST, 5)
    assert entry.load_seconds > 0.09


def test_a_slow_load_does_not_hold_up_another(make_cache: MakeCache, fetcher: FolderFetcher) -> None:
    cache = make_cache()
    fetcher.delay_seconds[digest_of("a4")] = 2.0
    slow = cache.acquire(digest_of("a4"))
    loaded(cache, "b4")
    assert not slow.ready


def test_the_true_rank_is_charged(make_cache: MakeCache, folders: dict[str, Path]) -> None:
    cache = make_cache()
    for name in ("a4", "d16"):
        loaded(cache, name)
    sizes = {entry.digest: entry.size_bytes for entry in cache.residency()}
    # q_proj: 64 in, 64 out; v_proj: 64 in, 32 out; two layers; four bytes.
    assert sizes[digest_of("a4")] == 4 * (128 + 96) * 2 * 4
    assert sizes[digest_of("d16")] == 4 * sizes[digest_of("a4")]
    assert cache.stats().host_used_bytes == sum(sizes.values())


def test_a_pin_puts_it_on_the_device_once(make_cache: MakeCache) -> None:
    cache = make_cache()
    lease = loaded(cache, "a4")
    first, second = lease.pin(), lease.pin()
    assert first is second
    (entry,) = cache.residency()
    assert (entry.state, entry.pins) == (AdapterState.DEVICE, 2)
    assert cache.stats().device_used_bytes == entry.size_bytes
    lease.unpin()
    lease.unpin()
    lease.release()
    (entry,) = cache.residency()
    assert (entry.state, entry.pins, entry.leases) == (AdapterState.DEVICE, 0, 0)


def test_on_a_cpu_the_device_tier_is_the_host_tiers_memory(make_cache: MakeCache) -> None:
    cache = make_cache()
    lease = loaded(cache, "a4")
    weights = lease.pin()
    assert weights is not None
    again = lease.pin()
    assert again is not None
    name = next(iter(weights.pairs))
    entry_weights = lease._entry.weights
    assert entry_weights is not None
    assert weights.pairs[name].a.data_ptr() == entry_weights.pairs[name].a.data_ptr()


def test_the_device_evicts_the_least_wanted_and_never_a_pinned_one(
    make_cache: MakeCache, folders: dict[str, Path]
) -> None:
    cache = make_cache(device_bytes=2 * size_of(folders, "a4"))
    hot, cold, fresh, large = (loaded(cache, name) for name in ("a4", "b4", "e4", "c8"))
    cache.acquire(digest_of("a4")).release()
    for lease in (hot, cold):
        assert lease.pin() is not None
        lease.unpin()
    assert fresh.pin() is not None
    assert on_device(cache) == {digest_of("a4"), digest_of("e4")}
    assert large.pin() is None, "it takes the whole device, half of which is pinned"
    assert on_device(cache) == {digest_of("a4"), digest_of("e4")}
    fresh.unpin()
    assert large.pin() is not None
    assert on_device(cache) == {digest_of("c8")}
    assert cache.stats().device_evictions == 3


def test_the_host_evicts_the_least_wanted(make_cache: MakeCache, folders: dict[str, Path]) -> None:
    cache = make_cache(host_bytes=2 * size_of(folders, "a4"))
    for name in ("a4", "b4"):
        loaded(cache, name).release()
    for _ in range(50):
        cache.acquire(digest_of("a4")).release()
    loaded(cache, "e4").release()
    assert {entry.digest for entry in cache.residency()} == {digest_of("a4"), digest_of("e4")}
    assert cache.stats().host_used_bytes == 2 * size_of(folders, "a4")


def test_leased_adapters_stay_and_the_next_load_waits_for_room(
    make_cache: MakeCache, folders: dict[str, Path]
) -> None:
    cache = make_cache(host_bytes=size_of(folders, "c8"))
    first = loaded(cache, "c8")
    second = cache.acquire(digest_of("a4"))
    time.sleep(0.2)
    assert not second.ready
    assert first.ready
    first.release()
    wait_for(lambda: second.ready)
    assert {entry.digest for entry in cache.residency()} == {digest_of("a4")}
    assert cache.stats().host_used_bytes == size_of(folders, "a4")


def test_an_adapter_larger_than_memory_is_refused(make_cache: MakeCache, folders: dict[str, Path]) -> None:
    cache = make_cache(host_bytes=size_of(folders, "d16") - 1)
    lease = cache.acquire(digest_of("d16"))
    wait_for(lambda: lease.error is not None)
    assert lease.error is not None
    assert lease.error.reason == "adapter_too_large"
    assert cache.stats().host_used_bytes == 0


def test_a_failure_is_remembered_for_a_while_and_then_tried_again(
    make_cache: MakeCache, fetcher: FolderFetcher, clock: Clock
) -> None:
    cache = make_cache()
    fetcher.errors[digest_of("a4")] = Unavailable("registry_down", "The registry does not answer.")
    lease = cache.acquire(digest_of("a4"))
    wait_for(lambda: lease.error is not None)
    lease.release()
    assert loaded(cache, "b4").ready
    with pytest.raises(Unavailable):
        cache.acquire(digest_of("a4"))
    assert fetcher.fetches.count(digest_of("a4")) == 1
    clock.seconds += 11.0
    del fetcher.errors[digest_of("a4")]
    assert loaded(cache, "a4").ready


def test_an_unknown_version_fails_by_name(make_cache: MakeCache) -> None:
    cache = make_cache()
    lease = cache.acquire(digest_of("nobody"))
    wait_for(lambda: lease.error is not None)
    assert isinstance(lease.error, NotFound)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "sha256:zz", "sha256:" + "0" * 63, "A" * 64])
def test_a_digest_that_is_none_is_refused(make_cache: MakeCache, digest: str) -> None:
    with pytest.raises(LorafleetError) as caught:
        make_cache().acquire(digest)
    assert caught.value.reason == "bad_digest"


def test_folders_outlive_the_process_and_are_not_fetched_again(
    make_cache: MakeCache, fetcher: FolderFetcher
) -> None:
    loaded(make_cache(), "a4")
    loaded(make_cache(), "a4")
    assert len(fetcher.fetches) == 1


def test_a_damaged_folder_is_fetched_again(
    make_cache: MakeCache, fetcher: FolderFetcher, tmp_path: Path
) -> None:
    loaded(make_cache(), "a4")
    folder = tmp_path / "disk" / digest_of("a4").removeprefix("sha256:")
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    loaded(make_cache(), "a4")
    assert len(fetcher.fetches) == 2
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_an_interrupted_fetch_leaves_nothing_behind(make_cache: MakeCache, tmp_path: Path) -> None:
    half = tmp_path / "disk" / "fetching-x1"
    half.mkdir(parents=True)
    (half / "adapter_config.json").write_text("{}")
    make_cache()
    assert list((tmp_path / "disk").iterdir()) == []


def test_the_disk_keeps_within_its_budget(
    make_cache: MakeCache, fetcher: FolderFetcher, tmp_path: Path
) -> None:
    cache = make_cache(disk_bytes=40_000)
    for name in NAMES:
        loaded(cache, name)
    used = cache.stats().disk_used_bytes
    assert used <= 40_000
    files = (path for path in (tmp_path / "disk").rglob("*") if path.is_file())
    assert used == sum(path.stat().st_size for path in files)
    assert digest_of("d16").removeprefix("sha256:") in {path.name for path in (tmp_path / "disk").iterdir()}


def test_random_leases_pins_and_evictions_keep_the_accounts(
    make_cache: MakeCache, folders: dict[str, Path]
) -> None:
    """Twenty holders come, run and go at random in tiers that hold about half of all adapters."""
    total = sum(size_of(folders, name) for name in NAMES)
    largest = size_of(folders, "d16")
    cache = make_cache(host_bytes=largest + total // 8, device_bytes=largest)
    draw = random.Random(3)
    held: list[tuple[Lease, int]] = []
    for _ in range(600):
        action = draw.random()
        if action < 0.35 and len(held) < 20:
            held.append((cache.acquire(digest_of(draw.choice(NAMES))), 0))
        elif action < 0.6 and held:
            index = draw.randrange(len(held))
            lease, pins = held[index]
            if lease.ready and lease.pin() is not None:
                held[index] = (lease, pins + 1)
        elif action < 0.7:
            cache.evict(digest_of(draw.choice(NAMES)))
        elif held:
            lease, pins = held.pop(draw.randrange(len(held)))
            for _ in range(pins):
                lease.unpin()
            lease.release()
        entries = {entry.digest: entry for entry in cache.residency()}
        stats = cache.stats()
        assert stats.host_used_bytes <= largest + total // 8
        assert stats.device_used_bytes <= largest
        for lease, pins in held:
            assert lease.error is None
            if pins:
                assert entries[lease.digest].state is AdapterState.DEVICE
                assert entries[lease.digest].pins >= pins
        on_device = [entry.size_bytes for entry in entries.values() if entry.state is AdapterState.DEVICE]
        assert stats.device_used_bytes == sum(on_device)
    for lease, pins in held:
        for _ in range(pins):
            lease.unpin()
        lease.release()
    assert all(entry.leases == 0 and entry.pins == 0 for entry in cache.residency())
    for name in NAMES:
        lease = loaded(cache, name)
        assert lease.pin() is not None
        lease.unpin()
        lease.release()


def test_the_owner_hears_of_every_load(make_cache: MakeCache) -> None:
    cache = make_cache()
    heard = threading.Semaphore(0)
    cache.on_change = heard.release
    cache.acquire(digest_of("a4"))
    cache.acquire(digest_of("nobody"))
    assert heard.acquire(timeout=20)
    assert heard.acquire(timeout=20)
