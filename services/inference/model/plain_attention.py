"""Attention with its scores written out, for models that change them before or after the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ScoreChanges:
    """What a model does to its attention scores.

    Attributes:
        softcap: c of c * tanh(score / c) (Gemma 2, arXiv 2408.00118, section 2); None for none.
        sinks: [heads] a learnt score for each head that takes part in the softmax and attends to nothing
            (gpt-oss, arXiv 2508.10925, section 2.2); None for none.
    """

    softcap: float | None = None
    sinks: Tensor | None = None

    def __bool__(self) -> bool:
        return self.softcap is not None or self.sinks is not None


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, changes: ScoreChanges
) -> Tensor:
    """Return softmax(cap(scaling * q k^T) + mask) v, in float32 from the scores to the weights.

    Args:
        query: [batch, kv_heads, group, queries, head_dim], `group` query heads for each KV head.
        key: [batch, kv_heads, keys, head_dim].
        value: as `key`.
        mask: 0 or minus infinity, of a shape that broadcasts to [batch, 1, 1, queries, keys].

    Returns:
        As `query`.
    """
    scores = torch.matmul(query, key.unsqueeze(2).transpose(-1, -2)).float() * scaling
    if changes.softcap is not None:
        scores = changes.softcap * torch.tanh(scores / changes.softcap)
    scores = scores + mask
    if changes.sinks is not None:
        _, kv_heads, group, _, _ = query.shape
        sinks = changes.sinks.float().view(1, kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat((scores, sinks), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights.to(value.dtype), value.unsqueeze(2))
