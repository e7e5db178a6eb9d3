# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
"""Adapters of a step on a GPU: every row's own A and B, of its own rank, read where they lie (Triton).

y = gain y + B (A x) + shift, in two launches per layer as Punica's (arXiv 2310.18547, section 4) and S-LoRA's
(arXiv 2311.03285, section 5): the first shrinks x to the rank, the second expands. A row's adapter is found
by address, so nothing is stacked and ranks are not padded beyond the block. Rows without an adapter end at
once. The tables of addresses lie where they are for good, so a captured graph reads those of its step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import ReferenceType, ref

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
# What the kernels take for granted of A and B, so that they may read many values at once.
_ALIGNMENT = tl.constexpr(16)


# Not specialised: no value of these may cost a compilation in the middle of traffic.
@triton.jit(do_not_specialize=["module", "low_stride"])
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
            a = tl.multiple_of(tl.load(update).to(x.dtype), _ALIGNMENT)
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


@triton.jit(do_not_specialize=["module", "low_stride"])
def _expand(
    y,
    low,
    tables,
    row_tables,
    module,
    width,
    low_stride,
    fields: tl.constexpr,
    rank_block: tl.constexpr,
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
        b = tl.multiple_of(tl.load(update + 1).to(y.dtype), _ALIGNMENT)
        total = tl.load(y + row * width + at, mask=inside, other=0.0).to(tl.float32)
        if gain != 0:
            total *= tl.load(gain.to(y.dtype) + at, mask=inside, other=0.0).to(tl.float32)
        for first in range(0, rank, rank_block):
            ranks = first + tl.arange(0, rank_block)
            parts = tl.load(
                b + ranks[:, None].to(tl.int64) * width + at[None, :],
                mask=(ranks < rank)[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            shares = tl.load(low + row * low_stride + ranks, mask=ranks < rank, other=0.0)
            total += tl.sum(parts * shares[:, None], axis=0)
        if shift != 0:
            total += tl.load(shift.to(y.dtype) + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * width + at, total.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """One adapter's updates [modules, 5] on the host. It keeps the adapter no longer than others do, so that
    one that is evicted frees its memory at once.

    Attributes:
        copies: tensors that had to be copied, to which the updates point.
    """

    updates: Tensor
    weights: ReferenceType[AdapterWeights]
    copies: tuple[Tensor, ...]


class TritonLora:
    """The adapters of one model's step. Owned by one model, used by one thread.

    Args:
        modules: gives each linear layer that adapters may change its row in their tables.
        max_rows: most rows of a step.
        max_adapters: most adapters of a step.
    """

    def __init__(
        self, modules: Mapping[str, int], device: torch.device, *, max_rows: int, max_adapters: int
    ) -> None:
        self._modules = modules
        self._in_use: dict[int, _Table] = {}
        self._tables = torch.zeros((max_adapters, len(modules), _FIELDS), dtype=torch.int64, device=device)
        self._row_tables = torch.full((max_rows,), -1, dtype=torch.int64, device=device)
        self._num_rows = 0
        self._max_rank = 0
        self.has_adapters = False

    def begin(self, rows: Sequence[AdapterRows], num_rows: int) -> None:
        """Bind the adapters of a step of `num_rows` rows."""
        in_use: dict[int, _Table] = {}
        row_tables = torch.full((num_rows,), -1, dtype=torch.int64)
        for item in rows:
            key = id(item.weights)
            if key not in in_use:
                made = self._in_use.get(key)
                is_theirs = made is not None and made.weights() is item.weights
                in_use[key] = made if made is not None and is_theirs else self._table(item.weights)
            row_tables[item.start : item.end] = list(in_use).index(key) * len(self._modules)
        self._num_rows = num_rows
        self._max_rank = max((item.weights.max_rank for item in rows), default=0)
        self.has_adapters = bool(rows)
        if rows and list(in_use.values()) != list(self._in_use.values()):
            updates = torch.stack([table.updates for table in in_use.values()])
            self._tables[: len(in_use)].copy_(updates, non_blocking=True)
        if rows:
            self._row_tables[:num_rows].copy_(row_tables, non_blocking=True)
        self._in_use = in_use

    def reserve(self, num_rows: int, max_rank: int) -> None:
        """Bind `num_rows` rows without an adapter, launching all that adapters of up to `max_rank` take: what
        is captured of this serves every later step of as many rows.
        """
        self.begin((), num_rows)
        self._row_tables.fill_(-1)
        self._max_rank = max_rank
        self.has_adapters = max_rank > 0

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
        rows, width, out = self._num_rows, x.shape[-1], y.shape[-1]
        ranks = max(self._max_rank, 1)
        low = torch.empty((rows, ranks), dtype=torch.float32, device=x.device)
        index = self._modules[module]
        _shrink[(rows, -(-ranks // _RANK_BLOCK))](
            x, low, self._tables, self._row_tables, index, width, ranks, _FIELDS, _RANK_BLOCK, _IN_BLOCK
        )
        _expand[(rows, -(-out // _OUT_BLOCK))](
            y, low, self._tables, self._row_tables, index, out, ranks, _FIELDS, _RANK_BLOCK, _OUT_BLOCK
        )

    def _table(self, weights: AdapterWeights) -> _Table:
        updates = torch.zeros(len(self._modules), _FIELDS, dtype=torch.int64)
        copies: list[Tensor] = []
        for name, pair in weights.pairs.items():
            addresses = []
            # Adapters are read with B stored the way the kernels want it, so neither is copied as a rule.
            for given in (pair.a, pair.b.T):
                used = _aligned(given)
                if used.data_ptr() != given.data_ptr():
                    copies.append(used)
                addresses.append(used.data_ptr())
            addresses += [0 if vector is None else vector.data_ptr() for vector in (pair.gain, pair.shift)]
            updates[self._modules[name]] = torch.tensor([*addresses, pair.rank])
        return _Table(updates, ref(weights), tuple(copies))


def _aligned(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy of it, as the kernels read it: contiguous, from an aligned address."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT.value == 0 else tensor.clone()
