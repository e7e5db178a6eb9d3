"""Adding low-rank updates to the output of a frozen linear layer, each to its own tokens of a flat batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dropout:
    """Elements of an input that are left out: each with probability `rate`, drawn from `seed` alone."""

    rate: float
    seed: int

    def factors(self, inputs: Tensor) -> Tensor:
        """Return what to multiply `inputs` by: 0 or 1 / (1 - rate); the same at every call."""
        generator = torch.Generator(inputs.device).manual_seed(self.seed)
        kept = torch.empty_like(inputs).bernoulli_(1.0 - self.rate, generator=generator)
        return kept.div_(1.0 - self.rate)


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale * B A on the tokens `start` to `stop` of a batch.

    Attributes:
        a: float32 [rank, in_features].
        b: float32 [out_features, rank].
    """

    start: int
    stop: int
    scale: float
    a: Tensor
    b: Tensor
    dropout: Dropout | None = None


def add_low_rank(output: Tensor, inputs: Tensor, updates: Sequence[LowRank]) -> Tensor:
    """Return `output` + sum of the updates, y_t += scale * B A x_t, in the memory of `output`.

    Hu et al. 2021, arXiv 2106.09685, equation 3. One function for all updates of a layer (as in mLoRA, Ye et
    al. 2025, arXiv 2312.02515, section 4.1), so that the batch is neither split nor joined on the way.

    Args:
        output: [..., out_features], of any float type; what the frozen layer made of `inputs`.
        inputs: [..., in_features].
    """
    factors = [tensor for update in updates for tensor in (update.a, update.b)]
    result: Tensor = _AddLowRank.apply(output, inputs, tuple(updates), *factors)  # type: ignore[no-untyped-call]
    return result


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, updates: tuple[LowRank, ...], *factors: Tensor
    ) -> Tensor:
        flat_output = output.view(-1, output.shape[-1])
        flat_inputs = inputs.reshape(-1, inputs.shape[-1])
        narrow = []
        for number, update in enumerate(updates):
            a, b = factors[2 * number], factors[2 * number + 1]
            low = torch.mm(_rows(flat_inputs, update, a.dtype), a.T).mul_(update.scale)
            narrow.append(low)
            _add_product(flat_output[update.start : update.stop], low, b.T)
        ctx.mark_dirty(output)
        ctx.updates = updates
        ctx.save_for_backward(inputs, *narrow, *factors)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        updates: tuple[LowRank, ...] = ctx.updates
        inputs, *saved = ctx.saved_tensors
        narrow, factors = saved[: len(updates)], saved[len(updates) :]
        flat_gradient = gradient.reshape(-1, gradient.shape[-1])
        flat_inputs = inputs.reshape(-1, inputs.shape[-1])
        wants_inputs = ctx.needs_input_grad[1]
        input_gradient = torch.empty_like(flat_inputs) if wants_inputs else None
        filled = 0
        factor_gradients: list[Tensor | None] = [None] * len(factors)
        for number, update in enumerate(updates):
            a, b = factors[2 * number], factors[2 * number + 1]
            wants_a, wants_b = ctx.needs_input_grad[3 + 2 * number : 5 + 2 * number]
            above = flat_gradient[update.start : update.stop].to(a.dtype)
            if wants_b:
                factor_gradients[2 * number + 1] = above.T @ narrow[number]
            if not wants_a and input_gradient is None:
                continue
            below = torch.mm(above, b).mul_(update.scale)
            if wants_a:
                factor_gradients[2 * number] = below.T @ _rows(flat_inputs, update, a.dtype)
            if input_gradient is not None:
                filled = _fill(input_gradient, below, a, update, filled)
        shaped = None
        if input_gradient is not None:
            input_gradient[filled:].zero_()
            shaped = input_gradient.view(inputs.shape)
        return gradient, shaped, None, *factor_gradients


def _fill(total: Tensor, below: Tensor, a: Tensor, update: LowRank, filled: int) -> int:
    """Add below @ a, dropout in it, to the update's rows of `total`; rows from `filled` on hold nothing yet.

    Returns:
        How many rows hold something now; updates come in the order of their tokens.
    """
    start = update.start
    stop = start + len(below)
    rows = total[start:stop]
    if start < filled:
        assert stop <= filled, "updates of one layer cover the same tokens or different ones"
        if update.dropout is None:
            _add_product(rows, below, a)
        else:
            change = below @ a
            rows += change.mul_(update.dropout.factors(change))
        return filled
    total[filled:start].zero_()
    if rows.dtype == a.dtype and update.dropout is None:
        torch.mm(below, a, out=rows)
    else:
        change = below @ a
        rows.copy_(change if update.dropout is None else change.mul_(update.dropout.factors(change)))
    return stop


def _add_product(rows: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `rows`, in the precision of the factors."""
    if rows.dtype == left.dtype:
        rows.addmm_(left, right)
    else:
        rows += left @ right


def _rows(flat_inputs: Tensor, update: LowRank, dtype: torch.dtype) -> Tensor:
    rows = flat_inputs[update.start : update.stop].to(dtype)
    return rows if update.dropout is None else rows * update.dropout.factors(rows)


def rescale(output: Tensor, start: int, stop: int, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return `output` with tokens `start` to `stop` as scale * (y - bias) + bias, in the memory of `output`.

    Args:
        output: [..., out_features].
        scale: float32 [out_features].
        bias: [out_features], the frozen layer's own, which is not scaled.
    """
    result: Tensor = _Rescale.apply(output, scale, bias, start, stop)  # type: ignore[no-untyped-call]
    return result


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, scale: Tensor, bias: Tensor | None, start: int, stop: int
    ) -> Tensor:
        span = output.view(-1, output.shape[-1])[start:stop]
        unscaled = span.to(scale.dtype) if bias is None else span.to(scale.dtype) - bias
        if span.dtype == scale.dtype and bias is None:
            unscaled = unscaled.clone()
        scaled = unscaled * scale
        span.copy_(scaled if bias is None else scaled + bias)
        ctx.mark_dirty(output)
        ctx.span = (start, stop)
        ctx.save_for_backward(unscaled, scale)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        unscaled, scale = ctx.saved_tensors
        start, stop = ctx.span
        below = gradient.clone()
        span = below.view(-1, below.shape[-1])[start:stop]
        scale_gradient = (span.to(scale.dtype) * unscaled).sum(dim=0)
        span.copy_(span.to(scale.dtype) * scale)
        return below, scale_gradient, None, None, None
