"""The loss of a batch: cross-entropy of the tokens that count."""

from __future__ import annotations

import torch
from torch.nn import functional


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy in nats of logits [counted, vocabulary] at targets [counted], as [counted]."""
    return functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
