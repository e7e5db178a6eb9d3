# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
"""Adapters of a step on a GPU: every row's own A and B, of its own rank, read where they lie (Triton).

y = gain y + B (A x) + shift, in two launches per layer as Punica's (arXiv 2310.18547, section 4) and S-LoRA's
(arXiv 2311.03285, section 5): the first shrinks x to the rank, the second expands. A row's adapter is found
by address, so nothing is stacked and ranks are not padded beyond the block. Rows without an adapter end at
once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

from services.inference.adapters.tables import AdapterRows
from services.inference.adapters.weights import AdapterWeights

_RANK_BLOCK = 16
_IN_BLOCK = 256
_OUT_BLOCK = 128
# a, b, gain, shift, rank of one module of one adapter.
_FIELDS = 5


@triton.jit
def _shrink(
    x,
    low,
    tables,
    row_tables,
    module,
    width,
    low_stride,
    fields: tl.constexpr,
    rank_block: tl.constexpr,
    in_block: tl.constexpr,
):
    row = tl.program_id(0)
    ranks = tl.program_id(1) * rank_block + tl.arange(0, rank_block)
    table = tl.load(row_tables + row)
    if table >= 0:
        update = tables + (table + module) * fields
        rank = tl.load(update + 4)
        if tl.program_id(1) * rank_block < rank:
            a = tl.load(update).to(x.dtype)
            total = tl.zeros((rank_block,), dtype=tl.float32)
            for first in range(0, width, in_block):
                at = first + tl.arange(0, in_block)
                inside = at < width
                values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
                weights = tl.load(
                    a + ranks[:, None].to(tl.int64) * width + at[None, :],
                    mask=(ranks < rank)[:, None] & inside[None, :],
                    other=0.0,
                ).to(tl.float32)
                total += tl.sum(weights * values[None, :], axis=1)
            tl.store(low + row * low_stride + ranks, total, mask=ranks < rank)


@triton.jit
def _expand(
    y,
    low,
    tables,
    row_tables,
    module,
    width,
    low_stride,
    fields: tl.constexpr,
    out_block: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.program_id(1) * out_block + tl.arange(0, out_block)
    table = tl.load(row_tables + row)
    if table >= 0:
        update = tables + (table + module) * fields
        rank = tl.load(update + 4)
        gain, shift = tl.load(update + 2), tl.load(update + 3)
        inside = at < width
        b = tl.load(update + 1).to(y.dtype)
        total = tl.load(y + row * width + at, mask=inside, other=0.0).to(tl.float32)
        if gain != 0:
            total *= tl.load(gain.to(y.dtype) + at, mask=inside, other=0.0).to(tl.float32)
        for r in range(rank):
            part = tl.load(b + r * width + at, mask=inside, other=0.0).to(tl.float32)
            total += part * tl.load(low + row * low_stride + r)
        if shift != 0:
            total += tl.load(shift.to(y.dtype) + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * width + at, total.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class _Table:
    """One adapter's updates [modules, 5] on the host, and what their addresses point to."""

    updates: Tensor
    max_rank: int
    kept: tuple[object, ...]


class TritonLora:
    """The adapters of one model's step. Owned by one model, used by one thread.

    `modules` gives each linear layer that adapters may change its row in their tables.
    """

    def __init__(self, modules: Mapping[str, int], device: torch.device) -> None:
        self._modules = modules
        self._device = device
        self._made: dict[int, _Table] = {}
        self._tables = torch.empty(0)
        self._row_tables = torch.empty(0)
        self._max_rank = 0
        self.has_adapters = False

    def begin(self, rows: Sequence[AdapterRows], num_rows: int) -> None:
        """Bind the adapters of a step of `num_rows` rows."""
        in_use: dict[int, _Table] = {}
        row_tables = torch.full((num_rows,), -1, dtype=torch.int64)
        for item in rows:
            key = id(item.weights)
            if key not in in_use:
                in_use[key] = self._made.get(key) or self._table(item.weights)
            row_tables[item.start : item.end] = list(in_use).index(key) * len(self._modules)
        self._made = in_use
        self.has_adapters = bool(rows)
        if rows:
            updates = torch.stack([table.updates for table in in_use.values()])
            self._tables = updates.to(self._device, non_blocking=True)
            self._row_tables = row_tables.to(self._device, non_blocking=True)
            self._max_rank = max(table.max_rank for table in in_use.values())

    def end(self) -> None:
        """Bind no adapter."""
        self.has_adapters = False

    def adapt(self, module: str, x: Tensor, y: Tensor) -> None:
        """Apply the rows' updates of `module` to y [..., out], in place, given the layer's input x [..., in].

        Adapters and activations are of one type.
        """
        x = x.contiguous()
        assert y.is_contiguous()
        assert x.dtype == y.dtype
        rows, width, out = len(self._row_tables), x.shape[-1], y.shape[-1]
        ranks = max(self._max_rank, 1)
        low = torch.empty((rows, ranks), dtype=torch.float32, device=x.device)
        index = self._modules[module]
        _shrink[(rows, triton.cdiv(ranks, _RANK_BLOCK))](
            x, low, self._tables, self._row_tables, index, width, ranks, _FIELDS, _RANK_BLOCK, _IN_BLOCK
        )
        _expand[(rows, triton.cdiv(out, _OUT_BLOCK))](
            y, low, self._tables, self._row_tables, index, out, ranks, _FIELDS, _OUT_BLOCK
        )

    def _table(self, weights: AdapterWeights) -> _Table:
        updates = torch.zeros(len(self._modules), _FIELDS, dtype=torch.int64)
        kept: list[object] = [weights]
        for name, pair in weights.pairs.items():
            a, b = pair.a.contiguous(), pair.b.T.contiguous()
            kept += [a, b]
            vectors = [0 if vector is None else vector.data_ptr() for vector in (pair.gain, pair.shift)]
            updates[self._modules[name]] = torch.tensor([a.data_ptr(), b.data_ptr(), *vectors, pair.rank])
        return _Table(updates, max((pair.rank for pair in weights.pairs.values()), default=0), tuple(kept))
