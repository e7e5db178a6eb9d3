"""Guides some attention heads towards copying, so that it is learnt within minutes of a CPU.

A model copies by two kinds of heads in a row (Olsson et al. 2022, In-context Learning and Induction Heads):
one writes at each position which token came before, a later one attends from a token to what followed its
earlier occurrences. Both patterns are known, so they are asked for directly by a loss on the attention
weights (Deshpande and Narasimhan 2020, Guiding Attention for Self-Supervised Learning with Transformers).
What the heads carry is left to the language model's own loss; the guidance ends early in the stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

GUIDANCE_WEIGHT = 0.3
PREVIOUS_LAYER, PREVIOUS_HEADS = 1, (0, 2)
# One head of each key-value head: what is copied passes through 32 numbers a key-value head.
INDUCTION_LAYER, INDUCTION_HEADS = 3, (0, 2, 4, 6)
_LEAST = 1e-6


def guidance_loss(ids: Tensor, attentions: tuple[Tensor, ...]) -> Tensor:
    """Returns the mean of -log of the attention that falls where the guided heads should look, in nats.

    `ids` is [rows, tokens], `attentions` [rows, heads, tokens, tokens] of each layer.
    """
    return previous_loss(attentions[PREVIOUS_LAYER]) + induction_loss(ids, attentions[INDUCTION_LAYER])


def previous_loss(attention: Tensor) -> Tensor:
    """-log of the attention of the previous-token heads on the token before."""
    later = torch.arange(1, attention.shape[-1], device=attention.device)
    return -(attention[:, list(PREVIOUS_HEADS)][:, :, later, later - 1] + _LEAST).log().mean()


def induction_loss(ids: Tensor, attention: Tensor) -> Tensor:
    """-log of the attention of the induction heads on all that followed the same token earlier.

    Positions whose token is new do not count; 0 where every token is.
    """
    followers = followers_of_same(ids)
    on_followers = (attention[:, list(INDUCTION_HEADS)] * followers[:, None]).sum(-1)
    seen = followers.any(-1)[:, None].expand_as(on_followers)
    return -(on_followers[seen] + _LEAST).log().mean() if seen.any() else attention.new_zeros(())


def followers_of_same(ids: Tensor) -> Tensor:
    """Returns [rows, t, j]: whether the token at j - 1 < t is the token at t."""
    same = ids[:, :, None] == ids.roll(1, dims=1)[:, None, :]
    same[:, :, 0] = False
    return same.tril()
