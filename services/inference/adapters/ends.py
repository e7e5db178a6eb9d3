"""The ends of the model: what adapters do to the input embedding and to the output head.

Few adapters change them and their tensors are large, so adapters are taken one by one, never stacked; rows
whose adapter leaves them alone are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from services.inference.adapters.weights import EmbeddingDelta, HeadDelta


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows `start` to `end` of the step's logits belong to one adapter that changes the output head."""

    start: int
    end: int
    delta: HeadDelta


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """Rows `start` to `end` of the step's tokens belong to one adapter that changes the input embedding."""

    start: int
    end: int
    delta: EmbeddingDelta


def apply_head(y: Tensor, x: Tensor, rows: Sequence[HeadRows]) -> None:
    """Change, in place, the logits y [rows, vocabulary] of x [rows, hidden] as each row's adapter wants."""
    for part in rows:
        part_x, part_y = x[part.start : part.end], y[part.start : part.end]
        pair, weight, bias = part.delta.pair, part.delta.weight, part.delta.bias
        if weight is not None:
            part_y.copy_(part_x @ weight.T)
            if bias is not None:
                part_y.add_(bias)
        if pair is not None:
            if pair.gain is not None:
                part_y.mul_(pair.gain)
            part_y.addmm_(part_x @ pair.a.T, pair.b.T)
            if pair.shift is not None:
                part_y.add_(pair.shift)


def add_embedding(y: Tensor, token_ids: Tensor, rows: Sequence[EmbeddingRows]) -> None:
    """Add, in place, what each row's adapter adds to the embeddings y [tokens, hidden] of token_ids."""
    for part in rows:
        low = part.delta.a[token_ids[part.start : part.end]]
        y[part.start : part.end].addmm_(low, part.delta.b.T)
