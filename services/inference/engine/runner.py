"""Runs the base model on a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from services.inference.engine.batch import Batch
from services.inference.model.loader import BaseModel


class Runner:
    """Holds the base model; `run` is one forward pass over a flat batch."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Compute the batch, write its keys and values to the pages, and return float32 logits [rows,
        vocabulary].
        """
        binding = self._base.binding
        binding.groups = batch.adapter_groups
        try:
            output = self._base.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.logit_rows,
                step=batch.attention,
            )
        finally:
            binding.groups = ()
        logits: Tensor = output.logits[0]
        return logits.float()
