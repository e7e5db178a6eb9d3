"""Decode steps that are captured once and replayed, at a few numbers of rows.

Launching a decode step's many small kernels one by one takes a GPU longer than running them. A step that only
decodes is therefore padded to the next captured number of rows and replayed with one call. Each number is
captured twice, without and with the launches for adapters, so that base-only steps pay nothing for them. All
other steps run as they are: with a prompt in them, with an adapter that changes the ends of the model, or
with one of a rank over `MAX_RANK`.

Capturing itself is a function that is handed in. `run_again` is its twin: it runs the same padded step from
Python each time.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from services.inference.engine.batch import Batch
from services.inference.engine.forward import forward
from services.inference.engine.padded import PaddedDecode
from services.inference.model.kv import PagedKv
from services.inference.model.loader import BaseModel

logger = logging.getLogger(__name__)

MAX_RANK = 64

Outputs = tuple[Tensor, Tensor]
Replay = Callable[[], Outputs]


class Capture(Protocol):
    """Makes a step into what replays it."""

    def __call__(self, step: Replay, num_rows: int, max_rank: int) -> Replay | None:
        """Return what does on later inputs what `step` does on its own, or None where the memory for that is
        not to be had. Its outputs are overwritten by the next replay of any step.

        `step` has `num_rows` rows, with adapters of up to `max_rank`; 0 is without adapters.

        Raises:
            RuntimeError: `step` cannot be captured.
        """
        ...


def run_again(step: Replay, num_rows: int, max_rank: int) -> Replay:
    """The twin of every capture: the step itself, of any rows and ranks."""
    return step


class DecodeGraphs:
    """The captured decode steps of one model, and the tensors that they read."""

    def __init__(self, base: BaseModel, kv: PagedKv, *, max_rows: int, max_model_len: int) -> None:
        self._base = base
        self._sizes = row_sizes(max_rows)
        self._padded = PaddedDecode(kv, max_rows, max_model_len, base.device)
        self._replays: dict[tuple[int, bool], Replay] = {}

    def __len__(self) -> int:
        return len(self._replays)

    @torch.inference_mode()
    def capture(self, capture: Capture) -> None:
        """Capture the steps of all sizes, the largest first, since the smaller ones fit into its memory.

        A model whose steps cannot be captured is left without, and so are sizes that there is no memory for.
        """
        for num_rows in reversed(self._sizes):
            self._padded.fill(None, num_rows)
            for max_rank in (MAX_RANK, 0):
                try:
                    replay = capture(partial(self._run, num_rows), num_rows, max_rank)
                except RuntimeError as error:
                    logger.warning("the base's decode steps run uncaptured: %s", error)
                    self._replays.clear()
                    return
                finally:
                    self._base.binding.clear()
                if replay is not None:
                    self._replays[num_rows, max_rank > 0] = replay
        logger.info("%d decode steps are captured, of up to %d rows", len(self._replays), self._sizes[-1])

    def rows_for(self, batch: Batch) -> int | None:
        """Return the number of rows that `batch` is to be padded to; None where no captured step serves."""
        if batch.attention.prefills or batch.embedding_rows or batch.head_rows:
            return None
        if any(rows.weights.max_rank > MAX_RANK for rows in batch.adapter_rows):
            return None
        at = bisect.bisect_left(self._sizes, batch.input_ids.shape[1])
        if at == len(self._sizes) or (self._sizes[at], bool(batch.adapter_rows)) not in self._replays:
            return None
        return self._sizes[at]

    def run(self, batch: Batch, num_rows: int) -> Outputs:
        """Replay the step of `num_rows` rows, as `rows_for` chose, on `batch`, whose adapters are bound;
        return what `forward` does.
        """
        self._padded.fill(batch, num_rows)
        logits, hidden = self._replays[num_rows, bool(batch.adapter_rows)]()
        return logits.index_select(0, batch.logit_rows), hidden.index_select(0, batch.logit_rows)

    def _run(self, num_rows: int) -> Outputs:
        padded = self._padded
        return forward(
            self._base,
            padded.input_ids[:, :num_rows],
            padded.position_ids[:, :num_rows],
            padded.step(num_rows),
            padded.rows[:num_rows],
        )


def row_sizes(max_rows: int) -> list[int]:
    """Return 1, 2, 4, 8 and from there on two sizes to each doubling, up to `max_rows`, which is the last."""
    sizes, size = [1, 2, 4, 8], 16
    while size < max_rows:
        sizes += [size, size * 3 // 2]
        size *= 2
    return [size for size in sizes if size < max_rows] + [max_rows]
