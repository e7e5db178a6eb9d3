"""The adapter cache: disk to host to device, with byte budgets and leases.

A request takes a lease when it arrives and keeps it to its end; the lease starts the load. A sequence takes a
pin when it is admitted to the batch. The host tier never evicts what is leased or on the device, the device
tier never what is pinned. Loads run on threads of their own, one per digest however many ask.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from services.common.errors import Internal, LorafleetError, ResourceExhausted
from services.inference.adapters.demand import Demand
from services.inference.adapters.disk import DiskTier, Fetcher, folder_name
from services.inference.adapters.slots import DeviceSlots
from services.inference.adapters.targets import LoraTargets
from services.inference.adapters.weights import AdapterWeights, adapter_size_bytes, read_adapter

logger = logging.getLogger(__name__)


class AdapterState(enum.Enum):
    """Where an adapter is."""

    FETCHING = "fetching"
    HOST = "host"
    DEVICE = "device"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class AdapterResidency:
    """One adapter as an operator sees it. Disk-only adapters are not listed.

    `last_use_at` and `retry_at` are on the cache's clock; `retry_at` and `error` are those of a failed load.
    """

    digest: str
    state: AdapterState
    size_bytes: int
    leases: int
    pins: int
    load_seconds: float
    last_use_at: float
    error: LorafleetError | None = None
    retry_at: float = 0.0


@dataclass(slots=True)
class _Entry:
    digest: str
    demand: Demand
    state: AdapterState = AdapterState.FETCHING
    leases: int = 0
    weights: AdapterWeights | None = None
    size_bytes: int = 0
    reserved_bytes: int = 0
    load_seconds: float = 0.0
    last_use_at: float = 0.0
    error: LorafleetError | None = None
    failed_until: float = 0.0


@dataclass(slots=True)
class CacheStats:
    """Counters since start and gauges of now."""

    host_used_bytes: int = 0
    device_used_bytes: int = 0
    disk_used_bytes: int = 0
    hits: int = 0
    misses: int = 0
    loads: int = 0
    load_failures: int = 0
    host_evictions: int = 0
    device_evictions: int = 0


class Lease:
    """One request's hold on one adapter version. Given back exactly once, by `release`."""

    def __init__(self, cache: AdapterCache, entry: _Entry) -> None:
        self._cache = cache
        self._entry = entry
        self._released = False

    @property
    def digest(self) -> str:
        return self._entry.digest

    @property
    def ready(self) -> bool:
        """Whether the weights are on the host, so that `pin` may succeed."""
        return self._entry.weights is not None

    @property
    def error(self) -> LorafleetError | None:
        """Why the load failed, if it did."""
        return self._entry.error

    def pin(self) -> AdapterWeights | None:
        """Put the adapter on the device and hold it there; None where the device has no room now."""
        return self._cache._pin(self._entry)

    def unpin(self) -> None:
        """Give one pin back."""
        self._cache._unpin(self._entry)

    def release(self) -> None:
        """Give the lease back."""
        assert not self._released, "a lease was released twice"
        self._released = True
        self._cache._release(self._entry)


@dataclass(frozen=True, slots=True)
class CacheBudget:
    """The knobs of the cache: bytes of the host tier, how many loads at once, and how long a failure is
    remembered.
    """

    host_bytes: int
    loader_threads: int = 4
    failure_seconds: float = 10.0
    demand_half_life_seconds: float = 300.0


class AdapterCache:
    """Adapters by version digest. Thread-safe; `acquire` and `Lease` never wait for I/O.

    `on_change` is called on a loader thread after each load has ended, well or badly; its owner sets it.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        disk: DiskTier,
        slots: DeviceSlots,
        targets: LoraTargets,
        dtype: torch.dtype,
        budget: CacheBudget,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetcher = fetcher
        self._disk = disk
        self._slots = slots
        self._targets = targets
        self._dtype = dtype
        self._budget = budget
        self._clock = clock
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._waiting_for_room: list[_Entry] = []
        self._host_used_bytes = 0
        self._stats = CacheStats()
        self._closed = False
        self._loaders = ThreadPoolExecutor(budget.loader_threads, thread_name_prefix="adapter-load")
        self.on_change: Callable[[], None] = _do_nothing

    def acquire(self, digest: str) -> Lease:
        """Take a lease on the version `digest` and start its load if it is not on the host.

        Raises:
            InvalidArgument: `bad_digest`.
            LorafleetError: the error of a load that failed less than `failure_seconds` ago.
        """
        folder_name(digest)
        now = self._clock()
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None and entry.error is not None:
                if now < entry.failed_until:
                    raise entry.error
                entry = None
            if entry is None:
                self._stats.misses += 1
                entry = _Entry(digest, Demand(self._budget.demand_half_life_seconds))
                self._entries[digest] = entry
                self._start_load(entry)
            else:
                self._stats.hits += entry.weights is not None
            entry.leases += 1
            entry.last_use_at = now
            entry.demand.add(now)
            return Lease(self, entry)

    def residency(self) -> list[AdapterResidency]:
        """List every adapter that is loading, loaded or recently failed."""
        with self._lock:
            return [
                AdapterResidency(
                    entry.digest,
                    AdapterState.DEVICE if entry.digest in self._slots else entry.state,
                    entry.size_bytes,
                    entry.leases,
                    self._slots[entry.digest].pins if entry.digest in self._slots else 0,
                    entry.load_seconds,
                    entry.last_use_at,
                    entry.error,
                    entry.failed_until,
                )
                for entry in self._entries.values()
            ]

    def on_disk(self) -> dict[str, int]:
        """Return the bytes on disk of every adapter there, by digest."""
        return self._disk.sizes()

    def evict(self, digest: str) -> bool:
        """Drop an adapter from every tier, and a failure from memory; may wait for the disk.

        False where it is leased, being loaded or not there.
        """
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                if entry.leases or entry.state is AdapterState.FETCHING:
                    return False
                self._drop_from_device(entry)
                self._drop_from_host(entry)
                self._retry_waiting()
        return self._disk.discard(digest) or entry is not None

    def stats(self) -> CacheStats:
        """Return a copy of the counters and gauges."""
        # Asked first: the disk may be slow, and the device thread must never wait for it by way of our lock.
        disk_used_bytes = self._disk.used_bytes
        with self._lock:
            stats = self._stats
            return CacheStats(
                self._host_used_bytes,
                self._slots.used_bytes,
                disk_used_bytes,
                stats.hits,
                stats.misses,
                stats.loads,
                stats.load_failures,
                stats.host_evictions,
                stats.device_evictions,
            )

    def close(self) -> None:
        """Stop the loader threads; loads not yet started are dropped."""
        with self._lock:
            self._closed = True
        self._loaders.shutdown(wait=True, cancel_futures=True)

    # Loading, on loader threads.

    def _start_load(self, entry: _Entry) -> None:
        if not self._closed:
            self._loaders.submit(self._load, entry)

    def _load(self, entry: _Entry) -> None:
        started = time.monotonic()
        try:
            with self._disk.open(entry.digest, self._fetcher) as folder:
                if not self._reserve(entry, adapter_size_bytes(folder, self._dtype)):
                    return
                weights = read_adapter(folder, self._targets, self._dtype)
                if not self._slots.shares_host_memory:
                    weights = weights.pinned()
        except LorafleetError as error:
            self._fail(entry, error)
        except (
            Exception
        ) as error:  # A loader must report whatever happens, or its requests would wait for ever.
            logger.exception("loading adapter %s failed", entry.digest)
            failure = Internal(
                "adapter_load_failed", f"The adapter could not be loaded: {type(error).__name__}."
            )
            self._fail(entry, failure)
        else:
            with self._lock:
                entry.load_seconds = time.monotonic() - started
                entry.weights = weights
                entry.state = AdapterState.HOST
                self._stats.loads += 1
                # All its leases may have gone while it was loading, and others may wait for its bytes.
                self._retry_waiting()
        self.on_change()

    def _reserve(self, entry: _Entry, size_bytes: int) -> bool:
        """Take host bytes for `entry`, or queue it for when others have been given back."""
        limit = min(self._budget.host_bytes, self._slots.budget_bytes)
        if size_bytes > limit:
            raise ResourceExhausted(
                "adapter_too_large",
                f"The adapter takes {size_bytes} bytes of memory; at most {limit} are possible here.",
                value=size_bytes,
                limit=limit,
            )
        with self._lock:
            entry.size_bytes = size_bytes
            if not self._make_host_room(size_bytes):
                self._waiting_for_room.append(entry)
                return False
            entry.reserved_bytes = size_bytes
            self._host_used_bytes += size_bytes
            return True

    def _fail(self, entry: _Entry, error: LorafleetError) -> None:
        with self._lock:
            entry.error = error
            entry.state = AdapterState.FAILED
            entry.failed_until = self._clock() + self._budget.failure_seconds
            self._give_back_reservation(entry)
            self._forget_old_failures()
            self._stats.load_failures += 1
            self._retry_waiting()

    def _forget_old_failures(self) -> None:
        now = self._clock()
        for entry in list(self._entries.values()):
            if entry.error is not None and entry.failed_until <= now:
                del self._entries[entry.digest]

    # Eviction, under the lock.

    def _make_host_room(self, size_bytes: int) -> bool:
        if self._host_used_bytes + size_bytes <= self._budget.host_bytes:
            return True
        now = self._clock()
        idle = [entry for entry in self._entries.values() if entry.weights is not None and not entry.leases]
        idle.sort(key=lambda entry: self._worth(entry, now))
        free_bytes = self._budget.host_bytes - self._host_used_bytes + sum(entry.size_bytes for entry in idle)
        if free_bytes < size_bytes:
            return False
        for entry in idle:
            if self._host_used_bytes + size_bytes <= self._budget.host_bytes:
                break
            self._drop_from_device(entry)
            self._drop_from_host(entry)
            self._stats.host_evictions += 1
        return True

    def _worth(self, entry: _Entry, now: float) -> float:
        """Seconds of reloading that keeping one byte saves: recent demand x reload time / bytes."""
        return entry.demand.at(now) * entry.load_seconds / max(entry.size_bytes, 1)

    def _drop_from_host(self, entry: _Entry) -> None:
        assert entry.leases == 0
        entry.weights = None
        self._give_back_reservation(entry)
        del self._entries[entry.digest]

    def _drop_from_device(self, entry: _Entry) -> None:
        if entry.digest in self._slots:
            self._slots.evict(entry.digest)

    def _give_back_reservation(self, entry: _Entry) -> None:
        self._host_used_bytes -= entry.reserved_bytes
        entry.reserved_bytes = 0

    def _retry_waiting(self) -> None:
        waiting, self._waiting_for_room = self._waiting_for_room, []
        for entry in waiting:
            if entry.leases:
                self._start_load(entry)
            elif self._entries.get(entry.digest) is entry:
                del self._entries[entry.digest]

    # What leases call.

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.leases -= 1
            assert entry.leases >= 0
            if entry.leases == 0 and self._waiting_for_room:
                self._retry_waiting()

    def _pin(self, entry: _Entry) -> AdapterWeights | None:
        with self._lock:
            assert entry.weights is not None
            assert entry.leases > 0
            if entry.digest not in self._slots:
                if not self._make_device_room(entry.size_bytes):
                    return None
                self._slots.put(entry.digest, entry.weights, entry.size_bytes)
            slot = self._slots[entry.digest]
            slot.pins += 1
            return slot.weights

    def _unpin(self, entry: _Entry) -> None:
        with self._lock:
            slot = self._slots[entry.digest]
            slot.pins -= 1
            assert slot.pins >= 0

    def _make_device_room(self, size_bytes: int) -> bool:
        """Evict unpinned adapters; a copy back costs time in proportion to bytes, so demand alone is their
        worth.
        """
        if self._slots.fits(size_bytes):
            return True
        now = self._clock()
        idle = [self._entries[digest] for digest in self._slots.unpinned()]
        idle.sort(key=lambda entry: entry.demand.at(now))
        free_bytes = (
            self._slots.budget_bytes - self._slots.used_bytes + sum(entry.size_bytes for entry in idle)
        )
        if free_bytes < size_bytes:
            return False
        for entry in idle:
            if self._slots.fits(size_bytes):
                break
            self._slots.evict(entry.digest)
            self._stats.device_evictions += 1
        return True


def _do_nothing() -> None:
    pass
