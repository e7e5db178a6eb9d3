"""Runs the base model on a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from services.common.failpoints import failpoint
from services.inference.engine.batch import Batch
from services.inference.engine.forward import forward
from services.inference.engine.graphs import DecodeGraphs
from services.inference.model.loader import BaseModel


class DeviceLost(Exception):  # noqa: N818 - it is a state, and what happened
    """The device does not answer any more; nothing that lies on it can be used."""


class Runner:
    """Holds the base model; `run` is one forward pass over a flat batch."""

    def __init__(self, base: BaseModel, graphs: DecodeGraphs | None = None) -> None:
        """With `graphs`, steps that they serve are replayed."""
        self._base = base
        self._graphs = graphs

    @torch.inference_mode()
    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the batch, write its keys and values to the pages, and return float32 logits [rows,
        vocabulary] and what the output head was given [rows, hidden].
        """
        graphs = self._graphs
        padded_rows = None if graphs is None else graphs.rows_for(batch)
        num_tokens = batch.input_ids.shape[1]
        binding = self._base.binding
        binding.groups = batch.adapter_groups
        if binding.kernel is not None:
            binding.kernel.begin(batch.adapter_rows, padded_rows or num_tokens)
        binding.embedding_rows = batch.embedding_rows
        binding.head_rows = batch.head_rows
        try:
            if graphs is not None and padded_rows is not None:
                logits, hidden = graphs.run(batch, padded_rows)
            else:
                logits, hidden = forward(
                    self._base, batch.input_ids, batch.position_ids, batch.attention, batch.logit_rows
                )
            failpoint("step.decode" if len(batch.chunks) == num_tokens else "step.prefill")
        finally:
            binding.clear()
        return logits, hidden

    def recover(self) -> None:
        """After a failure: give cached device memory back, and see that the device still computes.

        Raises:
            DeviceLost: it does not.
        """
        device = self._base.device
        if device.type != "cuda":
            return
        try:
            torch.cuda.empty_cache()
            torch.zeros(1, device=device).add_(1).item()
        except RuntimeError as error:
            raise DeviceLost(f"{device} does not answer: {error}") from error
