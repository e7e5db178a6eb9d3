"""A base with one job's update on it, as evaluation and publishing see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.trainer.spec import TrainingSpec
from services.trainer.training.adapter import TrainableAdapter
from services.trainer.training.base import ALL_TOKENS, Part, SharedBase
from services.trainer.training.batches import FlatBatch
from services.trainer.training.export import export


class AdapterModel:
    """One adapter on the shared base, outside of training: dropout is off.

    Attributes:
        base: the base, which other jobs may train on in turn.
        adapter: what the job trains.
        pad_id: the token that fills up padded rows.
    """

    def __init__(self, base: SharedBase, adapter: TrainableAdapter, spec: TrainingSpec, pad_id: int) -> None:
        self.base = base
        self.adapter = adapter
        self.pad_id = pad_id
        self._spec = spec
        self._has_adapter = True

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return self.base.device

    @property
    def model(self) -> Any:
        """The transformers model, without the adapter."""
        return self.base.model

    @torch.no_grad()
    def counted_logits(self, batch: FlatBatch) -> Tensor:
        """Return float32 logits [counted, vocabulary] of the rows of `batch`."""
        parts = (Part(self.adapter, 0, ALL_TOKENS),) if self._has_adapter else ()
        with self.base.adapting(parts):
            return self.base.counted_logits(batch)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Return float32 logits [rows, len(positions), vocabulary] of padded rows at the given positions."""
        with self.padded() as model:
            output = model(
                input_ids=input_ids.to(self.device),
                attention_mask=attention_mask.to(self.device),
                logits_to_keep=positions.to(self.device),
                use_cache=False,
            )
        logits: Tensor = output.logits
        return logits.float()

    @contextmanager
    def padded(self) -> Iterator[Any]:
        """Give the transformers model for padded rows and generation, adapter on where it is on."""
        with self.base.padded(self.adapter if self._has_adapter else None) as model:
            yield model

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Leave the adapter out for the body."""
        self._has_adapter = False
        try:
            yield
        finally:
            self._has_adapter = True

    def save(self, folder: Path, base_name: str) -> float:
        """Write the two files of a PEFT adapter to `folder`, and return the error of the conversion."""
        return export(self.adapter, self._spec, folder, base_name)
