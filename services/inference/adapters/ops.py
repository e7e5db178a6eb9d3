"""Adding the adapters' deltas to the rows of a batch, and the plain twin of that.

For a row x of adapter a: y += B_a (A_a x), with alpha / rank folded into B (LoRA, arXiv 2106.09685, equation
3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.inference.adapters.weights import AdapterWeights


@dataclass(frozen=True, slots=True)
class AdapterStack:
    """The weights of n adapters of one shape, stacked per module: A [n, rank, in] and B [n, out, rank]."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class AdapterGroup:
    """Rows `start` to `end` of the batch: those of each adapter of `stack` in turn, equally many each."""

    start: int
    end: int
    stack: AdapterStack


def add_lora(y: Tensor, x: Tensor, groups: Sequence[AdapterGroup], module: str) -> None:
    """Add, in place, each group's delta for `module` to y [rows, out], given x [rows, in].

    Adapters of unlike ranks or targets are in groups of their own, so each row costs its true rank. Rows
    outside all groups cost nothing.
    """
    for group in groups:
        pair = group.stack.pairs.get(module)
        if pair is None:
            continue
        a, b = pair
        rows_x, rows_y = x[group.start : group.end], y[group.start : group.end]
        adapters = a.shape[0]
        if adapters == 1:
            rows_y.addmm_(rows_x @ a[0].T, b[0].T)
        else:
            low = torch.bmm(rows_x.view(adapters, -1, x.shape[1]), a.transpose(1, 2))
            rows_y.view(adapters, -1, y.shape[1]).baddbmm_(low, b.transpose(1, 2))


def add_lora_reference(
    y: Tensor, x: Tensor, row_adapters: Sequence[AdapterWeights | None], module: str
) -> None:
    """Do what `add_lora` does, one row at a time: row i of y gets the delta of `row_adapters[i]`, None adds
    nothing.
    """
    for row, weights in enumerate(row_adapters):
        if weights is not None and module in weights.pairs:
            pair = weights.pairs[module]
            y[row] += pair.b @ (pair.a @ x[row])
