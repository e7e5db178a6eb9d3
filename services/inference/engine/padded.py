"""The inputs of decode steps as tensors that stay where they are, padded to a number of rows.

A captured graph reads the same memory at every replay. So each step's inputs are copied there, and rows
without a sequence are filled with one token at position 0 that lives in the scratch block and attends to
itself.
"""

from __future__ import annotations

import torch

from services.inference.engine.batch import Batch
from services.inference.model.attention import AttentionStep, DecodeGroup
from services.inference.model.kv import PagedKv


class PaddedDecode:
    """Input tensors for decode steps of up to `max_rows` sequences of up to `max_model_len` tokens.

    Attributes:
        input_ids: [1, max_rows].
        position_ids: [1, max_rows].
        rows: [max_rows] 0, 1, 2, and so on.
    """

    def __init__(self, kv: PagedKv, max_rows: int, max_model_len: int, device: torch.device) -> None:
        self._kv = kv
        width = -(-max_model_len // kv.shape.block_size)
        self._max_length = width * kv.shape.block_size
        self._scratch_slot = kv.scratch_block * kv.shape.block_size
        self.input_ids = torch.zeros((1, max_rows), dtype=torch.long, device=device)
        self.position_ids = torch.zeros_like(self.input_ids)
        self.rows = torch.arange(max_rows, device=device)
        self._slots = torch.empty(max_rows, dtype=torch.long, device=device)
        self._lengths = torch.empty_like(self._slots)
        self._tables = torch.zeros((max_rows, width), dtype=torch.long, device=device)
        self._pad(0, max_rows)

    def fill(self, batch: Batch | None, num_rows: int) -> None:
        """Copy the inputs of a step that only decodes, in the order of its rows; the rest of `num_rows` is
        padding, all of it without a batch.
        """
        taken = 0
        if batch is not None:
            taken = batch.input_ids.shape[1]
            assert taken <= num_rows
            assert not batch.attention.prefills
            self.input_ids[:, :taken].copy_(batch.input_ids)
            self.position_ids[:, :taken].copy_(batch.position_ids)
            self._slots[:taken].copy_(batch.attention.slots)
            for group in batch.attention.decodes:
                self._lengths[group.rows] = group.lengths
                # What lies beyond a row's own blocks is never attended to.
                self._tables[group.rows, : group.tables.shape[1]] = group.tables
        self._pad(taken, num_rows)

    def step(self, num_rows: int) -> AttentionStep:
        """Return the attention of the first `num_rows` rows. Every run takes a new one, since masks that a
        step's group remembers are those of its lengths.
        """
        group = DecodeGroup(
            rows=self.rows[:num_rows],
            tables=self._tables[:num_rows],
            lengths=self._lengths[:num_rows],
            max_length=self._max_length,
        )
        return AttentionStep(self._kv, self._slots[:num_rows], decodes=(group,), prefills=())

    def _pad(self, start: int, end: int) -> None:
        self.input_ids[:, start:end].zero_()
        self.position_ids[:, start:end].zero_()
        self._slots[start:end] = self._scratch_slot
        self._lengths[start:end] = 1
        self._tables[start:end, 0] = self._kv.scratch_block
