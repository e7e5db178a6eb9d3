"""One budget of device memory that the KV cache and the adapters share, with an elastic boundary."""

from __future__ import annotations

import threading
from typing import Protocol


class Holder(Protocol):
    """One side of the budget as the other sees it: what it could give up, and what that would cost."""

    def idle_bytes(self) -> int:
        """Return the bytes that nobody uses and that `free_idle` would free, call by call."""

    def idle_worth(self) -> float | None:
        """Return the seconds of work that would be lost per byte if the cheapest idle piece went: how often
        it is likely to be asked for in a second, times the seconds to make it again, by its bytes. None
        where nothing is idle.
        """

    def free_idle(self) -> bool:
        """Free the cheapest idle piece and give its bytes back to the budget; False where there is none."""


class DeviceBudget:
    """Bytes that KV pages and adapters hold of one total. Thread-safe.

    Each side has a nominal share and may grow into what the other does not use, but for `own_share` of the
    other's nominal share, which stays the other's. With `own_share` 1 the boundary is fixed.

    A sequence within the KV share and an adapter within the adapters' share always fit together, so whoever
    runs alone can run.

    Lock order: an owner may hold its own lock when it calls the budget. The budget never calls the adapters'
    holder with its own lock held. `lock` also guards the KV side's blocks.
    """

    def __init__(self, kv_bytes: int, adapter_bytes: int, *, own_share: float = 1.0) -> None:
        assert 0.0 <= own_share <= 1.0
        self.total_bytes = kv_bytes + adapter_bytes
        self.most_kv_bytes = kv_bytes + adapter_bytes - int(adapter_bytes * own_share)
        self.most_adapter_bytes = adapter_bytes + kv_bytes - int(kv_bytes * own_share)
        self.nominal_adapter_bytes = adapter_bytes
        self.kv_used_bytes = 0
        self.adapter_used_bytes = 0
        self.kv: Holder | None = None
        self.adapters: Holder | None = None
        self.lock = threading.RLock()

    @property
    def kv_room_bytes(self) -> int:
        """Bytes that the KV cache could take now without anything being freed."""
        free = self.total_bytes - self.kv_used_bytes - self.adapter_used_bytes
        return max(0, min(self.most_kv_bytes - self.kv_used_bytes, free))

    @property
    def adapter_room_bytes(self) -> int:
        """Bytes that adapters could take now without anything being freed."""
        free = self.total_bytes - self.kv_used_bytes - self.adapter_used_bytes
        return max(0, min(self.most_adapter_bytes - self.adapter_used_bytes, free))

    def take_kv(self, size_bytes: int) -> bool:
        """Take bytes for KV pages, or nothing."""
        with self.lock:
            if size_bytes > self.kv_room_bytes:
                return False
            self.kv_used_bytes += size_bytes
            return True

    def give_back_kv(self, size_bytes: int) -> None:
        """Give bytes of KV pages back."""
        with self.lock:
            self.kv_used_bytes -= size_bytes
            assert self.kv_used_bytes >= 0

    def take_adapters(self, size_bytes: int) -> bool:
        """Take bytes for an adapter, or nothing. See `make_room_for_adapters`."""
        with self.lock:
            if size_bytes > self.adapter_room_bytes:
                return False
            self.adapter_used_bytes += size_bytes
            return True

    def give_back_adapters(self, size_bytes: int) -> None:
        """Give bytes of an adapter back."""
        with self.lock:
            self.adapter_used_bytes -= size_bytes
            assert self.adapter_used_bytes >= 0

    def kv_could_have_bytes(self) -> int:
        """Return the bytes that the KV cache could take if every idle adapter were freed."""
        idle = 0 if self.adapters is None else self.adapters.idle_bytes()
        with self.lock:
            free = self.total_bytes - self.kv_used_bytes - self.adapter_used_bytes + idle
            return max(0, min(self.most_kv_bytes - self.kv_used_bytes, free))

    def make_room_for_adapters(self, size_bytes: int) -> bool:
        """Free idle pages and idle adapters, the cheapest first, until `size_bytes` of adapters fit.

        False, with nothing freed, where all that is idle would not do.
        """
        if size_bytes <= self.adapter_room_bytes:
            return True
        if size_bytes > self._adapters_could_have_bytes():
            return False
        while size_bytes > self.adapter_room_bytes:
            too_full = self.adapter_used_bytes + size_bytes > self.most_adapter_bytes
            cheapest = self._cheapest(self.adapters, None if too_full else self.kv)
            if cheapest is None or not cheapest.free_idle():
                return False
        return True

    def _adapters_could_have_bytes(self) -> int:
        idle_adapters = 0 if self.adapters is None else self.adapters.idle_bytes()
        idle_kv = 0 if self.kv is None else self.kv.idle_bytes()
        kept = self.adapter_used_bytes - idle_adapters
        free = self.total_bytes - (self.kv_used_bytes - idle_kv) - kept
        return min(self.most_adapter_bytes - kept, free)

    @staticmethod
    def _cheapest(*holders: Holder | None) -> Holder | None:
        worths = [(holder, holder.idle_worth()) for holder in holders if holder is not None]
        idle = [(worth, order, holder) for order, (holder, worth) in enumerate(worths) if worth is not None]
        return min(idle)[2] if idle else None
