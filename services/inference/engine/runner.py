"""Runs the base model on a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from services.inference.engine.batch import Batch
from services.inference.model.loader import BaseModel


class DeviceLost(Exception):  # noqa: N818 - it is a state, and what happened
    """The device does not answer any more; nothing that lies on it can be used."""


class Runner:
    """Holds the base model; `run` is one forward pass over a flat batch."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    @torch.inference_mode()
    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the batch, write its keys and values to the pages, and return float32 logits [rows,
        vocabulary] and what the output head was given [rows, hidden].
        """
        binding = self._base.binding
        binding.groups = batch.adapter_groups
        if binding.kernel is not None:
            binding.kernel.begin(batch.adapter_rows, batch.input_ids.shape[1])
        binding.embedding_rows = batch.embedding_rows
        binding.head_rows = batch.head_rows
        try:
            output = self._base.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.logit_rows,
                step=replace(batch.attention, kernel=self._base.attention),
            )
            hidden = binding.hidden
        finally:
            binding.clear()
        assert hidden is not None, "the output head was run"
        logits: Tensor = output.logits[0]
        return logits.float(), hidden

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
