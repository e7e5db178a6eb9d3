"""Attention over a flat batch: rows stand one behind the other and none sees another.

The model runs on input ids [1, tokens] with positions that restart at every row. Every attention layer calls
`row_attention`, which finds the lengths of the rows among the keyword arguments that transformers passes
through: softmax(scaling * q k^T) v within each row, causal, optionally within a sliding window. No mask is
built, so rows cannot
see each other by construction, and no padding is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers import AttentionInterface

from services.common.errors import Unimplemented

# No mask function is registered under this name, so transformers builds no mask.
ATTENTION_NAME = "lorafleet_rows"


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: Sequence[int],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend for one layer. The base is frozen, so its own attention dropout is off.

    Args:
        query: [1, heads, tokens, head_dim], rotated.
        key: [1, kv_heads, tokens, head_dim], rotated.
        value: as `key`.
        row_lengths: tokens of each row; they add up to `tokens`.
        softcap: scores become softcap * tanh(score / softcap).

    Returns:
        [1, tokens, heads, head_dim] and no weights.

    Raises:
        Unimplemented: `attention_feature_unsupported`, for attention sinks.
    """
    if s_aux is not None:
        raise Unimplemented(
            "attention_feature_unsupported",
            "The base's attention uses sinks, which cannot be trained on here.",
        )
    assert attention_mask is None, "rows are told apart by their lengths"
    outputs = []
    start = 0
    for length, run in itertools.groupby(row_lengths):
        count = sum(1 for _ in run)
        span = slice(start, start + count * length)
        start = span.stop
        rows = [_as_rows(tensor[0, :, span], count) for tensor in (query, key, value)]
        outputs.append(_attend(rows[0], rows[1], rows[2], scaling, sliding_window, softcap))
    return torch.cat(outputs).unsqueeze(0), None


def _as_rows(tensor: Tensor, count: int) -> Tensor:
    """Return [heads, count * length, head_dim] as [count, heads, length, head_dim]."""
    heads, tokens, head_dim = tensor.shape
    return tensor.reshape(heads, count, tokens // count, head_dim).transpose(0, 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend for rows of one length.

    [count, heads, length, head_dim] to [count * length, heads, head_dim].
    """
    count, heads, length, head_dim = query.shape
    if key.shape[1] != heads:
        key, value = (tensor.repeat_interleave(heads // key.shape[1], dim=1) for tensor in (key, value))
    mask = None
    if softcap is not None or (window is not None and window < length):
        positions = torch.arange(length, device=query.device)
        mask = positions[None, :] <= positions[:, None]
        if window is not None:
            mask &= positions[None, :] > positions[:, None] - window
    if softcap is None:
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
    else:
        assert mask is not None
        scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else head_dim**-0.5)
        scores = softcap * torch.tanh(scores / softcap)
        output = (
            softmax(scores.masked_fill(~mask, -torch.inf), dim=-1, dtype=torch.float32).to(value.dtype)
            @ value
        )
    return output.transpose(1, 2).reshape(count * length, heads, head_dim)


AttentionInterface.register(ATTENTION_NAME, row_attention)
