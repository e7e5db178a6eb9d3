"""Which rows each optimizer step sees: a pure function of seed and step, so that resuming is exact."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.trainer.tokens import TokenRow

# Rows are sorted by length inside windows of this many steps: little padding, still a random order.
WINDOW_STEPS = 16
IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass, padded on the right.

    Attributes:
        input_ids: int64 [rows, tokens].
        attention_mask: int64 [rows, tokens], 1 on real tokens.
        labels: int64 [rows, tokens]; `IGNORED_LABEL` where a token does not count. Position t is predicted
            from t - 1.
        num_tokens: real tokens.
        num_supervised: tokens that count.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    num_tokens: int
    num_supervised: int


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The order of a whole run.

    A step's rows are chosen before they are cut into forward passes, so one pass of eight rows and eight
    passes of one see the same rows.
    """

    rows: Sequence[TokenRow]
    batch_size: int
    gradient_accumulation_steps: int
    n_epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows; the last one may be smaller."""
        return -(-len(self.rows) // (self.batch_size * self.gradient_accumulation_steps))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.steps_per_epoch * self.n_epochs

    def epoch(self, number: int) -> list[list[int]]:
        """Return the row indices of each step of epoch `number` (from 0)."""
        # Not for secrets: the order must be the same again.
        shuffled = random.Random(f"{self.seed}/{number}")  # noqa: S311
        order = list(range(len(self.rows)))
        shuffled.shuffle(order)
        rows_per_step = self.batch_size * self.gradient_accumulation_steps
        window_rows = rows_per_step * WINDOW_STEPS
        steps: list[list[int]] = []
        for start in range(0, len(order), window_rows):
            window = order[start : start + window_rows]
            window.sort(key=lambda index: len(self.rows[index].ids))
            groups = [window[i : i + rows_per_step] for i in range(0, len(window), rows_per_step)]
            shuffled.shuffle(groups)
            steps += groups
        return steps

    def micro_batches(self, indices: Sequence[int], pad_id: int) -> list[MicroBatch]:
        """Return the forward passes of a step over the rows `indices`."""
        return [
            collate([self.rows[i] for i in indices[start : start + self.batch_size]], pad_id)
            for start in range(0, len(indices), self.batch_size)
        ]


def collate(rows: Sequence[TokenRow], pad_id: int) -> MicroBatch:
    """Return `rows` as one padded batch."""
    width = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED_LABEL, dtype=torch.long)
    for number, row in enumerate(rows):
        ids = torch.tensor(row.ids, dtype=torch.long)
        counts = torch.tensor(row.supervised, dtype=torch.bool)
        input_ids[number, : len(ids)] = ids
        attention_mask[number, : len(ids)] = 1
        labels[number, : len(ids)] = torch.where(counts, ids, IGNORED_LABEL)
    return MicroBatch(
        input_ids,
        attention_mask,
        labels,
        num_tokens=sum(len(row.ids) for row in rows),
        num_supervised=sum(row.num_supervised for row in rows),
    )
