"""The loss of a batch: summed cross-entropy over the tokens that count."""

from __future__ import annotations

import torch
from torch.nn import functional

from services.trainer.training.batches import IGNORED_LABEL, MicroBatch
from services.trainer.training.model import AdapterModel


def counted_logits(model: AdapterModel, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [rows, positions, vocabulary] and targets [rows, positions].

    The positions are those where some row has a counted token. The output head runs there only: with a big
    vocabulary it would need most of the memory.
    """
    counted = (batch.labels[:, 1:] != IGNORED_LABEL).any(dim=0)
    positions = counted.nonzero().squeeze(1)
    logits = model.logits(batch.input_ids, batch.attention_mask, positions)
    return logits, batch.labels[:, positions + 1].to(logits.device)


def summed_loss(model: AdapterModel, batch: MicroBatch) -> torch.Tensor:
    """Return the cross-entropy in nats, summed over the counted tokens of `batch`; a scalar."""
    logits, targets = counted_logits(model, batch)
    return functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
