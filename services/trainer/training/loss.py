"""The loss of a batch: summed cross-entropy over the tokens that count."""

from __future__ import annotations

import torch
from torch.nn import functional


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy in nats of logits [counted, vocabulary], summed over targets [counted]."""
    return functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")
