"""One frozen base in the form it is served in, shared by every job that trains on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from services.common.base_loading import load_base_model
from services.common.fingerprint import Quantization
from services.trainer.training.adapter import TrainableAdapter
from services.trainer.training.attention import ATTENTION_NAME
from services.trainer.training.batches import FlatBatch
from services.trainer.training.lowrank import add_low_rank

PADDED_ATTENTION = "sdpa"
# As the end of a part: all that there are.
ALL_TOKENS = sys.maxsize


@dataclass(frozen=True, slots=True)
class BaseFolder:
    """Where a base lies and in which form it is trained on."""

    name: str
    path: Path
    quantization: Quantization


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens `start` to `stop` of a flat batch are those of `adapter`."""

    adapter: TrainableAdapter
    start: int
    stop: int


class SharedBase:
    """A frozen transformers model whose linear layers add the update of each job to that job's tokens.

    The base keeps the values it is served with: nothing of it is cast, merged or changed, and its own dropout
    is off. (PEFT's k-bit preparation would cast 16-bit embeddings and norms to float32, which serving does
    not do.)

    Attributes:
        model: the transformers model.
        linears: the linear layers that can have an update, by name, in the order of the model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        head = model.get_output_embeddings()
        self.linears: dict[str, nn.Linear] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        self._parts: tuple[Part, ...] = ()
        self._recorder: Callable[[str, Tensor], None] | None = None
        self._checkpoints_activations = False
        for name, module in self.linears.items():
            module.register_forward_hook(partial(self._after_linear, name))

    @classmethod
    def load(cls, folder: BaseFolder, device: torch.device) -> SharedBase:
        """Load the base as inference loads it."""
        return cls(load_base_model(folder.path, folder.quantization, device=device, attention=ATTENTION_NAME))

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        device: torch.device = self.model.device
        return device

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them, from now on."""
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self._checkpoints_activations = True
        self._prepare_flat()

    @contextmanager
    def adapting(self, parts: Sequence[Part]) -> Iterator[None]:
        """Add the updates of `parts` in the body.

        It holds the backward pass too, which may compute layers again.
        """
        self._parts = tuple(parts)
        try:
            yield
        finally:
            self._parts = ()

    def counted_logits(self, batch: FlatBatch) -> Tensor:
        """Return float32 logits [counted, vocabulary] at the positions of `batch` whose next token counts.

        The output head runs there only: with a big vocabulary it would need most of the memory.
        """
        output = self.model(
            input_ids=batch.input_ids[None].to(self.device),
            position_ids=batch.position_ids[None].to(self.device),
            logits_to_keep=batch.counted.to(self.device),
            row_lengths=batch.row_lengths,
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits[0].float()

    @contextmanager
    def padded(self, adapter: TrainableAdapter | None) -> Iterator[Any]:
        """Give the model for padded rows with a mask and a cache, every row with `adapter`."""
        self.model.eval()
        self.model.set_attn_implementation(PADDED_ATTENTION)
        try:
            with self.adapting(() if adapter is None else (Part(adapter, 0, ALL_TOKENS),)):
                yield self.model
        finally:
            self.model.set_attn_implementation(ATTENTION_NAME)
            self._prepare_flat()

    @contextmanager
    def recording(self, recorder: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Show `recorder` the name and the input [..., in_features] of every linear layer that runs."""
        self._recorder = recorder
        try:
            yield
        finally:
            self._recorder = None

    def _prepare_flat(self) -> None:
        if not self._checkpoints_activations:
            return
        # Transformers checkpoints in training mode alone, in which the base's dropout would be on.
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()

    def _after_linear(
        self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        if self._recorder is not None:
            self._recorder(name, inputs[0])
        updates = [
            update for part in self._parts for update in part.adapter.updates(name, part.start, part.stop)
        ]
        if updates:
            output = add_low_rank(output, inputs[0], updates)
        for part in self._parts:
            output = part.adapter.rescale(output, name, part.start, part.stop)
        return output
