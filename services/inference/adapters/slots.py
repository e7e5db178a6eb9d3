"""The device tier: adapters whose weights lie where the base model computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.inference.adapters.ops import AdapterStack
from services.inference.adapters.weights import AdapterWeights


@dataclass(slots=True)
class Slot:
    """One adapter on the device. `pins` counts the sequences that run on it; a pinned slot stays."""

    weights: AdapterWeights
    size_bytes: int
    pins: int = 0


class DeviceSlots:
    """Adapters on the device, within `budget_bytes` at true rank.

    On a CPU the weights alias the host tier's memory: nothing is stored twice, and the budget still bounds
    how much of the host tier may be in use at once. On a GPU they are copies, made asynchronously on the
    current stream.
    """

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        self.device = device
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._slots: dict[str, Slot] = {}

    @property
    def shares_host_memory(self) -> bool:
        """Whether the device tier is the host tier's memory."""
        return self.device.type == "cpu"

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def __getitem__(self, digest: str) -> Slot:
        return self._slots[digest]

    def __len__(self) -> int:
        return len(self._slots)

    def unpinned(self) -> list[str]:
        """Return the digests that may be evicted."""
        return [digest for digest, slot in self._slots.items() if slot.pins == 0]

    def fits(self, size_bytes: int) -> bool:
        """Whether `size_bytes` more are within the budget now."""
        return self.used_bytes + size_bytes <= self.budget_bytes

    def put(self, digest: str, weights: AdapterWeights, size_bytes: int) -> None:
        """Copy `weights` to the device; the caller has made room."""
        assert digest not in self._slots
        assert self.fits(size_bytes)
        self._slots[digest] = Slot(weights.to(self.device, non_blocking=True), size_bytes)
        self.used_bytes += size_bytes

    def evict(self, digest: str) -> None:
        """Free an unpinned slot."""
        slot = self._slots.pop(digest)
        assert slot.pins == 0, "a pinned adapter was evicted"
        self.used_bytes -= slot.size_bytes


class StackCache:
    """Stacks of the adapters that decode together, kept while the same adapters keep decoding together.

    A stack of several adapters is a copy of their weights, made when the composition of the batch changes.
    Copies take at most `budget_bytes`; beyond that the caller gets None and runs the adapters one by one.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._stacks: dict[tuple[str, ...], AdapterStack] = {}
        self._sizes: dict[tuple[str, ...], int] = {}
        self._wanted: set[tuple[str, ...]] = set()

    def begin_step(self) -> None:
        """Drop the copies that the step before did not ask for."""
        for key in self._stacks.keys() - self._wanted:
            self.used_bytes -= self._sizes.pop(key)
            del self._stacks[key]
        self._wanted = set()

    def stack(self, digests: Sequence[str], weights: Sequence[AdapterWeights]) -> AdapterStack | None:
        """Return the stack of `weights`, all of one shape key; None where it would exceed the budget."""
        if len(weights) == 1:
            pairs = weights[0].pairs.items()
            return AdapterStack({name: (pair.a.unsqueeze(0), pair.b.unsqueeze(0)) for name, pair in pairs})
        key = tuple(digests)
        self._wanted.add(key)
        if key not in self._stacks:
            size_bytes = sum(item.size_bytes for item in weights)
            if self.used_bytes + size_bytes > self.budget_bytes:
                return None
            self._stacks[key] = _stacked(weights)
            self._sizes[key] = size_bytes
            self.used_bytes += size_bytes
        return self._stacks[key]


def _stacked(weights: Sequence[AdapterWeights]) -> AdapterStack:
    pairs = {
        name: (
            torch.stack([item.pairs[name].a for item in weights]),
            torch.stack([item.pairs[name].b for item in weights]),
        )
        for name in weights[0].pairs
    }
    return AdapterStack(pairs)
