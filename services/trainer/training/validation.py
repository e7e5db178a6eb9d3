"""Loss and token accuracy on given rows, teacher-forced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.trainer.tokens import TokenRow
from services.trainer.training.batches import flatten, row_lengths
from services.trainer.training.loss import token_losses
from services.trainer.training.model import AdapterModel


@dataclass(frozen=True, slots=True)
class RowScores:
    """Sums over the counted tokens of each row, in the order given; each array is [rows].

    Attributes:
        loss_sums: cross-entropy in nats.
        correct: tokens that were the most likely ones.
        counts: counted tokens.
    """

    loss_sums: NDArray[np.float64]
    correct: NDArray[np.float64]
    counts: NDArray[np.float64]

    @property
    def loss(self) -> float:
        """Mean over all counted tokens."""
        return float(self.loss_sums.sum() / self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Share of all counted tokens."""
        return float(self.correct.sum() / self.counts.sum())


def measure(
    model: AdapterModel, rows: Sequence[TokenRow], batch_size: int, *, check: Callable[[], None]
) -> RowScores:
    """Return the scores of `rows` under the model as it is now, `batch_size` rows at a time.

    Args:
        check: called before every forward pass; raises to give up.
    """
    result = np.zeros((3, len(rows)), dtype=np.float64)
    lengths = row_lengths(rows)
    order = sorted(range(len(rows)), key=lambda index: lengths[index])
    for start in range(0, len(order), batch_size):
        check()
        chosen = order[start : start + batch_size]
        batch = flatten([rows[i] for i in chosen])
        logits = model.counted_logits(batch)
        targets = batch.targets.to(logits.device)
        losses = token_losses(logits, targets)
        hits = logits.argmax(dim=-1) == targets
        ends = np.cumsum(batch.counted_rows)[:-1].tolist()
        for row, values in enumerate((losses, hits)):
            result[row, chosen] = [float(part.sum()) for part in values.cpu().tensor_split(ends)]
        result[2, chosen] = batch.counted_rows
    return RowScores(*result)
