"""The device tier: adapters whose weights lie where the base model computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.common.failpoints import failpoint
from services.inference.adapters.device_budget import DeviceBudget
from services.inference.adapters.measures import count_bytes
from services.inference.adapters.ops import AdapterStack
from services.inference.adapters.weights import AdapterWeights


@dataclass(slots=True)
class Slot:
    """One adapter on the device. `pins` counts the sequences that run on it; a pinned slot stays."""

    weights: AdapterWeights
    size_bytes: int
    pins: int = 0


class DeviceSlots:
    """Adapters on the device, at true rank, on the adapters' side of the device's `budget`.

    On a CPU the weights alias the host tier's memory: nothing is stored twice, and the budget still bounds
    how much of the host tier may be in use at once. On a GPU they are copies, made asynchronously on the
    current stream.
    """

    def __init__(self, device: torch.device, budget: DeviceBudget) -> None:
        self.device = device
        self.budget = budget
        self.used_bytes = 0
        self._slots: dict[str, Slot] = {}

    @property
    def budget_bytes(self) -> int:
        """The adapters' nominal share, which they can always have."""
        return self.budget.nominal_adapter_bytes

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

    def put(self, digest: str, weights: AdapterWeights, size_bytes: int) -> bool:
        """Copy `weights` to the device; False, with nothing copied, where it has no room."""
        assert digest not in self._slots
        if not self.budget.take_adapters(size_bytes):
            return False
        failpoint("device.copying")
        self._slots[digest] = Slot(weights.to(self.device, non_blocking=True), size_bytes)
        self.used_bytes += size_bytes
        count_bytes("device", size_bytes)
        return True

    def evict(self, digest: str) -> None:
        """Free an unpinned slot."""
        slot = self._slots.pop(digest)
        assert slot.pins == 0, "a pinned adapter was evicted"
        self.used_bytes -= slot.size_bytes
        count_bytes("device", -slot.size_bytes)
        self.budget.give_back_adapters(slot.size_bytes)


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
            return _stacked(weights)
        key = tuple(digests)
        self._wanted.add(key)
        if key not in self._stacks:
            size_bytes = sum(tensor.nbytes for item in weights for tensor in _stacked_tensors(item))
            if self.used_bytes + size_bytes > self.budget_bytes:
                return None
            self._stacks[key] = _stacked(weights)
            self._sizes[key] = size_bytes
            self.used_bytes += size_bytes
        return self._stacks[key]


def _stacked_tensors(weights: AdapterWeights) -> list[Tensor]:
    return [tensor for pair in weights.pairs.values() for tensor in pair.tensors]


def _stacked(weights: Sequence[AdapterWeights]) -> AdapterStack:
    pairs, gains, shifts = {}, {}, {}
    for name, first in weights[0].pairs.items():
        of_all = [item.pairs[name] for item in weights]
        pairs[name] = (_stack([pair.a for pair in of_all]), _stack([pair.b for pair in of_all]))
        if first.gain is not None:
            gains[name] = _stack([pair.gain for pair in of_all])
        if first.shift is not None:
            shifts[name] = _stack([pair.shift for pair in of_all])
    return AdapterStack(pairs, gains, shifts)


def _stack(tensors: Sequence[Tensor | None]) -> Tensor:
    """Stack tensors of one shape; a single one is not copied."""
    present = [tensor for tensor in tensors if tensor is not None]
    assert len(present) == len(tensors), "adapters of unlike shapes were stacked"
    return present[0].unsqueeze(0) if len(present) == 1 else torch.stack(present)
