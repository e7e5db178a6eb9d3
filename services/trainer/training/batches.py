"""Which rows each optimizer step sees: a pure function of seed and step, so that resuming is exact."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from services.trainer.tokens import TokenRow

# Rows are sorted by length inside windows of this many steps: rows of one length attend at once, still in
# random order.
WINDOW_STEPS = 16
# Rows that are packed against each other at a time.
PACKING_WINDOW_ROWS = 4096

Bin = tuple[int, ...]
"""The rows, by index, that fill one row of a forward pass; without packing just one."""


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """Rows of one forward pass, one behind the other, without padding.

    Attributes:
        input_ids: int64 [tokens].
        position_ids: int64 [tokens], from 0 in every row.
        row_lengths: tokens of each row.
        counted: int64 [counted], the positions whose next token counts in the loss.
        targets: int64 [counted], those next tokens.
        counted_rows: counted tokens of each row.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    row_lengths: tuple[int, ...]
    counted: torch.Tensor
    targets: torch.Tensor
    counted_rows: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.input_ids)

    @property
    def num_counted(self) -> int:
        """Tokens that count in the loss."""
        return len(self.targets)


def flatten(rows: Sequence[TokenRow]) -> FlatBatch:
    """Return `rows` as one batch."""
    ids: list[int] = []
    positions: list[int] = []
    counted: list[int] = []
    counted_rows = []
    for row in rows:
        start = len(ids)
        # Position t is predicted from t - 1.
        predicting = [start + t - 1 for t, counts in enumerate(row.supervised) if counts]
        ids += row.ids
        positions += range(len(row.ids))
        counted += predicting
        counted_rows.append(len(predicting))
    where = torch.tensor(counted, dtype=torch.long)
    input_ids = torch.tensor(ids, dtype=torch.long)
    return FlatBatch(
        input_ids,
        torch.tensor(positions, dtype=torch.long),
        tuple(len(row.ids) for row in rows),
        where,
        input_ids[where + 1],
        tuple(counted_rows),
    )


def join(batches: Sequence[FlatBatch]) -> FlatBatch:
    """Return the rows of all `batches` as one."""
    if len(batches) == 1:
        return batches[0]
    offsets = [0]
    for batch in batches:
        offsets.append(offsets[-1] + batch.num_tokens)
    return FlatBatch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.position_ids for batch in batches]),
        tuple(length for batch in batches for length in batch.row_lengths),
        torch.cat([batch.counted + offset for batch, offset in zip(batches, offsets, strict=False)]),
        torch.cat([batch.targets for batch in batches]),
        tuple(count for batch in batches for count in batch.counted_rows),
    )


@dataclass(frozen=True)
class BatchPlan:
    """The order of a whole run.

    A step's rows are chosen before they are cut into forward passes, so one pass of eight rows and eight
    passes of one see the same rows.

    Attributes:
        packed_tokens: with packing, the most tokens in one bin; 0 puts every row in a bin of its own.
        group_by_length: whether a step's bins are of similar length.
    """

    rows: Sequence[TokenRow]
    batch_size: int
    gradient_accumulation_steps: int
    n_epochs: int
    seed: int
    packed_tokens: int = 0
    group_by_length: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows; the last one may be smaller."""
        return -(-len(self.bins) // self._bins_per_step)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.steps_per_epoch * self.n_epochs

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return row_lengths(self.rows)

    @cached_property
    def bins(self) -> list[Bin]:
        """The bins that the rows are put in, the same in every epoch."""
        if not self.packed_tokens:
            return [(index,) for index in range(len(self.rows))]
        # Not for secrets: the bins must be the same again.
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed}/packing").shuffle(order)  # noqa: S311
        bins: list[Bin] = []
        for start in range(0, len(order), PACKING_WINDOW_ROWS):
            bins += best_fit(order[start : start + PACKING_WINDOW_ROWS], self.lengths, self.packed_tokens)
        return bins

    def epoch(self, number: int) -> list[list[Bin]]:
        """Return the bins of each step of epoch `number` (from 0)."""
        # Not for secrets: the order must be the same again.
        shuffled = random.Random(f"{self.seed}/{number}")  # noqa: S311
        order = list(self.bins)
        shuffled.shuffle(order)
        window_bins = self._bins_per_step * WINDOW_STEPS
        steps: list[list[Bin]] = []
        for start in range(0, len(order), window_bins):
            window = order[start : start + window_bins]
            if self.group_by_length:
                window.sort(key=lambda each: sum(self.lengths[index] for index in each))
            groups = [window[i : i + self._bins_per_step] for i in range(0, len(window), self._bins_per_step)]
            shuffled.shuffle(groups)
            steps += groups
        return steps

    def passes(self, step: Sequence[Bin]) -> list[FlatBatch]:
        """Return the forward passes of a step over the bins `step`."""
        return [
            flatten([self.rows[i] for each in step[start : start + self.batch_size] for i in each])
            for start in range(0, len(step), self.batch_size)
        ]

    @property
    def _bins_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps


def row_lengths(rows: Sequence[TokenRow]) -> list[int]:
    """Return the tokens of each row, without reading the rows where their lengths are known."""
    known = getattr(rows, "lengths", None)
    return [len(row.ids) for row in rows] if known is None else [int(length) for length in known]


def best_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[Bin]:
    """Return the rows `order` in bins of at most `capacity` tokens.

    Best-fit decreasing (Johnson 1973): the longest first, each in the fullest bin that has room.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index in sorted(order, key=lambda i: -lengths[i]):
        length = lengths[index]
        place = bisect.bisect_left(room, (length, 0))
        if place < len(room):
            free, number = room.pop(place)
        else:
            free, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        bisect.insort(room, (free - length, number))
    return [tuple(each) for each in bins]
