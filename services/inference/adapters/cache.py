"""The adapter cache: registry to disk to host to device, with byte budgets and leases.

A request takes a lease when it arrives and keeps it to its end; the lease starts the load. A sequence takes a
pin when it is admitted to the batch. An operator may have an adapter kept on the device. The host tier never
evicts what is leased, kept or pinned, the device tier never what is kept or pinned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from services.common.errors import LorafleetError, ResourceExhausted
from services.inference.adapters.demand import DemandHistory
from services.inference.adapters.device import DeviceTier
from services.inference.adapters.disk import DiskTier, Fetcher, folder_name
from services.inference.adapters.entry import AdapterEntry, AdapterResidency, AdapterState
from services.inference.adapters.eviction import Worth, reload_cost_per_byte
from services.inference.adapters.host import HostTier
from services.inference.adapters.lease import Lease
from services.inference.adapters.loader import AdapterLoader
from services.inference.adapters.measures import CacheMeasures, CacheStats
from services.inference.adapters.reader import adapter_size_bytes, read_adapter
from services.inference.adapters.slots import DeviceSlots
from services.inference.adapters.targets import LoraTargets
from services.inference.adapters.weights import AdapterWeights


@dataclass(frozen=True, slots=True)
class CacheBudget:
    """The knobs of the cache.

    Attributes:
        host_bytes: of the host tier.
        kept_bytes: most of the device that kept adapters may take, so that the others can still be served.
        loader_threads: adapters read at once.
        download_threads: adapters downloaded at once.
        failure_seconds: how long a failed load is remembered.
        demand_half_life_seconds: how fast demand is forgotten.
    """

    host_bytes: int
    kept_bytes: int = 0
    loader_threads: int = 4
    download_threads: int = 16
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
        worth: Worth = reload_cost_per_byte,
    ) -> None:
        self._disk = disk
        self._budget = budget
        self._clock = clock
        self._lock = threading.RLock()
        self._entries: dict[str, AdapterEntry] = {}
        self._waiting_for_host: list[AdapterEntry] = []
        self._history = DemandHistory(budget.demand_half_life_seconds)
        self._measures = CacheMeasures()
        self._host = HostTier(budget.host_bytes, disk, worth)
        self._device = DeviceTier(
            slots,
            self._entries,
            self._lock,
            self._measures,
            kept_budget_bytes=budget.kept_bytes,
            demand_half_life_seconds=budget.demand_half_life_seconds,
            clock=clock,
            worth=worth,
        )
        self._closed = False
        self._loader = AdapterLoader(
            fetcher,
            disk,
            _Reader(targets, dtype),
            self,
            reader_threads=budget.loader_threads,
            download_threads=budget.download_threads,
            is_copied=not slots.shares_host_memory,
        )
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
            is_new = entry is None
            if entry is None:
                entry = AdapterEntry(digest, self._history.of(digest), asked_at=now)
                self._entries[digest] = entry
            entry.leases += 1
            entry.last_use_at = now
            entry.demand.add(now)
            self._measures.asked(digest, is_hit=entry.weights is not None)
            if is_new:
                self._start_load(entry)
            return Lease(self, entry)

    def residency(self) -> list[AdapterResidency]:
        """List every adapter that is loading, loaded or recently failed."""
        with self._lock:
            return [self._resident(entry) for entry in self._entries.values()]

    def find(self, digest: str) -> AdapterResidency | None:
        """Return one adapter, as `residency` lists it."""
        with self._lock:
            entry = self._entries.get(digest)
            return None if entry is None else self._resident(entry)

    def is_on_device(self, digest: str) -> bool:
        """Whether an adapter is on the device."""
        return digest in self._device

    def tiers(self) -> dict[str, AdapterState]:
        """Return where each adapter is, by digest; cheaper than `residency`."""
        with self._lock:
            return {
                digest: AdapterState.DEVICE if digest in self._device else entry.state
                for digest, entry in self._entries.items()
            }

    def held(self) -> set[str]:
        """Return the digests that are leased or kept."""
        with self._lock:
            return {digest for digest, entry in self._entries.items() if entry.leases or entry.kept}

    def on_disk(self) -> dict[str, int]:
        """Return the bytes on disk of every adapter there, by digest."""
        return self._disk.sizes()

    def origins(self) -> list[str]:
        """Return what the fetcher said of every adapter on disk, where it said anything."""
        return self._disk.origins()

    def evict(self, digest: str) -> bool:
        """Drop an adapter from every tier, and a failure from memory; may wait for the disk.

        False where it is leased, kept, being loaded or not there.
        """
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                if entry.leases or entry.kept or entry.state is AdapterState.FETCHING:
                    return False
                self._drop(entry)
                self._retry_waiting()
        return self._disk.discard(digest) or entry is not None

    def keep(self, digest: str) -> bool:
        """Hold a leased and loaded adapter on the device until `let_go`; it is put there as soon as there is
        room, before all others. False where it was kept already.

        Raises:
            ResourceExhausted: `pin_budget_exceeded`.
        """
        with self._lock:
            entry = self._entries[digest]
            assert entry.leases > 0
            assert entry.weights is not None
            if entry.kept:
                return False
            self._device.keep(entry)
            return True

    def let_go(self, digest: str) -> bool:
        """End what `keep` began; False where the adapter was not kept."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None or not entry.kept:
                return False
            self._device.let_go(entry)
            self._retry_waiting()
            return True

    def stats(self) -> CacheStats:
        """Return a copy of the counters and gauges."""
        with self._lock:
            return replace(
                self._measures.stats,
                host_used_bytes=self._host.used_bytes,
                device_used_bytes=self._device.used_bytes,
                disk_used_bytes=self._disk.used_bytes,
            )

    def close(self) -> None:
        """Stop the loader threads; loads not yet started are dropped."""
        with self._lock:
            self._closed = True
        self._loader.close()

    # What the loader calls, on its threads.

    def reserve(self, entry: AdapterEntry, size_bytes: int) -> bool:
        """Take host bytes for `entry`, or queue it for when others have been given back."""
        with self._lock:
            limit = min(self._host.budget_bytes - self._device.kept_used_bytes, self._device.room_bytes)
            if size_bytes > limit:
                raise ResourceExhausted(
                    "adapter_too_large",
                    f"The adapter takes {size_bytes} bytes of memory; at most {limit} are possible here.",
                    value=size_bytes,
                    limit=limit,
                )
            entry.size_bytes = size_bytes
            victims = self._host.victims(self._entries.values(), size_bytes, self._clock())
            if victims is None:
                self._waiting_for_host.append(entry)
                return False
            for digest in victims:
                self._drop(self._entries[digest])
                self._measures.evicted("host")
            self._host.take(entry, size_bytes)
            return True

    def loaded(self, entry: AdapterEntry, weights: AdapterWeights) -> None:
        """Take the weights over."""
        with self._lock:
            entry.weights = weights
            entry.state = AdapterState.HOST
            self._measures.loaded(entry.times, self._clock() - entry.asked_at)
            # All its leases may have gone while it was loading, and others may wait for its bytes.
            self._retry_waiting()
        self.on_change()

    def failed(self, entry: AdapterEntry, error: LorafleetError) -> None:
        """Note that a load failed, for whoever holds it and for those who ask in the next seconds."""
        with self._lock:
            entry.error = error
            entry.state = AdapterState.FAILED
            entry.failed_until = self._clock() + self._budget.failure_seconds
            self._host.give_back(entry)
            self._forget_old_failures()
            self._measures.failed(error.reason)
            self._retry_waiting()
        self.on_change()

    def _start_load(self, entry: AdapterEntry) -> None:
        if not self._closed:
            self._loader.start(entry)

    def _forget_old_failures(self) -> None:
        now = self._clock()
        for entry in list(self._entries.values()):
            if entry.error is not None and entry.failed_until <= now:
                del self._entries[entry.digest]

    # What leases call.

    def release(self, entry: AdapterEntry) -> None:
        """Take a lease back."""
        with self._lock:
            entry.leases -= 1
            assert entry.leases >= 0
            if entry.leases == 0 and self._waiting_for_host:
                self._retry_waiting()

    def pin(self, entry: AdapterEntry) -> AdapterWeights | None:
        """Put a leased adapter on the device for a sequence; None where the device has no room now."""
        with self._lock:
            assert entry.weights is not None
            assert entry.leases > 0
            slot = self._device.pin(entry)
            return None if slot is None else slot.weights

    def unpin(self, entry: AdapterEntry) -> None:
        """Take a sequence's pin back."""
        with self._lock:
            self._device.unpin(entry)

    def _drop(self, entry: AdapterEntry) -> None:
        assert entry.leases == 0
        assert not entry.kept
        self._device.evict(entry)
        entry.weights = None
        self._host.give_back(entry)
        del self._entries[entry.digest]

    def _retry_waiting(self) -> None:
        waiting, self._waiting_for_host = self._waiting_for_host, []
        for entry in waiting:
            if entry.leases:
                self._start_load(entry)
            elif self._entries.get(entry.digest) is entry:
                del self._entries[entry.digest]

    def _resident(self, entry: AdapterEntry) -> AdapterResidency:
        return AdapterResidency(
            entry.digest,
            AdapterState.DEVICE if entry.digest in self._device else entry.state,
            entry.size_bytes,
            entry.leases,
            self._device.pins(entry.digest),
            entry.kept,
            entry.times.total_seconds,
            entry.last_use_at,
            entry.error,
            entry.failed_until,
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads folders for one base."""

    targets: LoraTargets
    dtype: torch.dtype

    def size_bytes(self, folder: Path) -> int:
        return adapter_size_bytes(folder, self.targets, self.dtype)

    def read(self, folder: Path) -> AdapterWeights:
        return read_adapter(folder, self.targets, self.dtype)


def _do_nothing() -> None:
    pass
