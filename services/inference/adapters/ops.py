"""Adding the adapters' deltas to the rows of a batch, and the plain twin of that.

For a row x of adapter a: y = gain_a * y + B_a (A_a x) + shift_a, with alpha / rank folded into B (LoRA, arXiv
2106.09685, equation 3). Gains (DoRA, arXiv 2402.09353, equation 5) and shifts (biases) are there for few
adapters only; the others pay nothing for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.inference.adapters.weights import AdapterWeights


@dataclass(frozen=True, slots=True)
class AdapterStack:
    """The weights of n adapters of one shape, stacked per module.

    Attributes:
        pairs: A [n, rank, in] and B [n, out, rank].
        gains: [n, out], of the modules that have one.
        shifts: [n, out], of the modules that have one.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdapterGroup:
    """Rows `start` to `end` of the batch: those of each adapter of `stack` in turn, equally many each."""

    start: int
    end: int
    stack: AdapterStack


def add_lora(y: Tensor, x: Tensor, groups: Sequence[AdapterGroup], module: str) -> None:
    """Apply, in place, each group's delta for `module` to y [rows, out], given x [rows, in].

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
        gain, shift = group.stack.gains.get(module), group.stack.shifts.get(module)
        if gain is not None:
            rows_y.view(adapters, -1, y.shape[1]).mul_(gain.unsqueeze(1))
        if adapters == 1:
            rows_y.addmm_(rows_x @ a[0].T, b[0].T)
        else:
            low = torch.bmm(rows_x.view(adapters, -1, x.shape[1]), a.transpose(1, 2))
            rows_y.view(adapters, -1, y.shape[1]).baddbmm_(low, b.transpose(1, 2))
        if shift is not None:
            rows_y.view(adapters, -1, y.shape[1]).add_(shift.unsqueeze(1))


def add_lora_reference(
    y: Tensor, x: Tensor, row_adapters: Sequence[AdapterWeights | None], module: str
) -> None:
    """Do what `add_lora` does, one row at a time: row i of y gets the delta of `row_adapters[i]`, None adds
    nothing.
    """
    for row, weights in enumerate(row_adapters):
        if weights is not None and module in weights.pairs:
            pair = weights.pairs[module]
            gain = 1.0 if pair.gain is None else pair.gain
            shift = 0.0 if pair.shift is None else pair.shift
            y[row] = gain * y[row] + pair.b @ (pair.a @ x[row]) + shift
