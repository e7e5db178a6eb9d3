"""Adapters as the compiled kernels read them: tables of addresses, so that no weight is copied."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from services.inference.adapters.weights import AdapterWeights
from services.inference.kernels.library import Update


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Rows `start` to `end` of the flat batch use `weights`."""

    start: int
    end: int
    weights: AdapterWeights


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """One adapter's updates, one for each module of the base.

    Attributes:
        address: of the first.
        max_rank: the largest rank of any module.
        kept: what the addresses point to.
    """

    address: int
    max_rank: int
    kept: tuple[object, ...]


class AdapterTables:
    """The tables of the adapters that the current step uses, kept from step to step while they run.

    `modules` gives each module of the base its row in the tables.
    """

    def __init__(self, modules: Mapping[str, int]) -> None:
        self._modules = modules
        self._tables: dict[int, AdapterTable] = {}

    def of(self, rows: Sequence[AdapterRows]) -> list[AdapterTable]:
        """Return the table of each of `rows`, and forget those of all other adapters."""
        tables: dict[int, AdapterTable] = {}
        for item in rows:
            # A table keeps its weights alive, so while it is here the id is theirs.
            key = id(item.weights)
            if key not in tables:
                tables[key] = self._tables.get(key) or self._made(item.weights)
        self._tables = tables
        return [tables[id(item.weights)] for item in rows]

    def _made(self, weights: AdapterWeights) -> AdapterTable:
        updates = (Update * len(self._modules))()
        kept: list[object] = [weights, updates]
        for name, pair in weights.pairs.items():
            # Adapters are read with B stored the way the kernels want it, so neither is copied.
            a, b = pair.a.contiguous(), pair.b.T.contiguous()
            kept += [a, b]
            updates[self._modules[name]] = Update(
                a.data_ptr(), b.data_ptr(), _address(pair.gain), _address(pair.shift), pair.rank
            )
        max_rank = max((pair.rank for pair in weights.pairs.values()), default=0)
        return AdapterTable(ctypes.addressof(updates), max_rank, tuple(kept))


def _address(vector: Tensor | None) -> int | None:
    assert vector is None or vector.is_contiguous()
    return None if vector is None else vector.data_ptr()
