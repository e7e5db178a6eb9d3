"""The attention seam: a flat batch of many sequences attends over paged KV.

The model runs on input ids [1, tokens]. Every attention layer calls `paged_attention`, which finds the step's
`AttentionStep` among the keyword arguments that transformers passes through, writes the new keys and values
into the pages, and attends: softmax(scaling * q k^T) v per sequence, causal, optionally within a sliding
window.

No mask function is registered under our name, so transformers builds no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from services.common.errors import Unimplemented
from services.inference.model.kv import PagedKv

ATTENTION_NAME = "lorafleet_paged"


@dataclass(slots=True)
class DecodeGroup:
    """Sequences of similar length that each add one token.

    Attributes:
        rows: [n] position of each sequence's token in the flat batch.
        tables: [n, blocks] block tables, padded with block 0.
        lengths: [n] tokens to attend to, the new one included.
        max_length: the largest of `lengths`.
    """

    rows: Tensor
    tables: Tensor
    lengths: Tensor
    max_length: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive mask [n, 1, 1, max_length], the same for every layer with this `window`."""
        mask = self._masks.get(window)
        if mask is None:
            keys = torch.arange(self.max_length, device=self.lengths.device)
            seen = keys < self.lengths[:, None]
            if window is not None:
                seen &= keys >= self.lengths[:, None] - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            mask = mask[:, None, None, :]
            self._masks[window] = mask
        return mask


@dataclass(slots=True)
class PrefillSpan:
    """A run of tokens of one sequence: `length` new ones at `start` of the flat batch, after `context` cached
    ones.

    `table` [1, blocks] covers context and new tokens.
    """

    start: int
    length: int
    context: int
    table: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """Return the boolean mask [length, context + length], true where a query may look."""
        mask = self._masks.get(window)
        if mask is None:
            keys = torch.arange(self.context + self.length, device=self.table.device)
            queries = keys[self.context :, None]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            self._masks[window] = mask
        return mask

    def is_plain_causal(self, window: int | None) -> bool:
        """Whether nothing is cached and the window hides nothing, so that the new keys are all the keys."""
        return self.context == 0 and (window is None or window >= self.length)


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What one step's attention needs: the pages, where new tokens go, and who looks at what."""

    kv: PagedKv
    slots: Tensor
    decodes: Sequence[DecodeGroup]
    prefills: Sequence[PrefillSpan]


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: AttentionStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **unsupported: object,
) -> tuple[Tensor, None]:
    """Attend for one layer over the pages of `step`.

    Args:
        module: the layer's attention module; its `layer_idx` picks the pages.
        query: [1, heads, tokens, head_dim], rotated.
        key: [1, kv_heads, tokens, head_dim], rotated.
        value: as `key`.

    Returns:
        [1, tokens, heads, head_dim] and no weights.

    Raises:
        Unimplemented: `attention_feature_unsupported` for soft caps, sinks, position biases and other extras.
    """
    _refuse_extras(attention_mask, dropout, unsupported)
    layer = module.layer_idx
    assert isinstance(layer, int)
    queries, keys, values = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    step.kv.write(layer, step.slots, keys, values)
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    for group in step.decodes:
        output[group.rows] = _decode(step.kv, layer, group, queries[group.rows], scaling, sliding_window)
    for span in step.prefills:
        rows = slice(span.start, span.start + span.length)
        if span.is_plain_causal(sliding_window):
            attended = _attend(queries[rows], keys[rows], values[rows], None, scaling)
        else:
            seen = span.context + span.length
            pages_k, pages_v = step.kv.read(layer, span.table)
            mask = span.mask(sliding_window)
            attended = _attend(queries[rows], pages_k[0, :seen], pages_v[0, :seen], mask, scaling)
        output[rows] = attended
    return output.unsqueeze(0), None


def _refuse_extras(attention_mask: Tensor | None, dropout: float, extras: dict[str, object]) -> None:
    named = {name: value for name, value in extras.items() if name in _REFUSED and value is not None}
    if extras.get("is_causal") is False:
        named["is_causal"] = False
    if attention_mask is not None:
        named["attention_mask"] = "given"
    if dropout:
        named["dropout"] = dropout
    if named:
        raise Unimplemented(
            "attention_feature_unsupported",
            f"The base model's attention uses {', '.join(sorted(named))}, which this engine does not serve.",
            field="base",
            value=sorted(named),
        )


_REFUSED = frozenset({"softcap", "s_aux", "position_bias"})


def _decode(
    kv: PagedKv,
    layer: int,
    group: DecodeGroup,
    queries: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attend for one query per sequence: queries [n, heads, head_dim] to [n, heads, head_dim].

    The query heads that share a KV head stand in the place of query positions, so keys are never repeated.
    """
    keys, values = kv.read(layer, group.tables)
    n, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.view(n, kv_heads, heads // kv_heads, head_dim)
    output = scaled_dot_product_attention(
        grouped,
        keys[:, : group.max_length].transpose(1, 2),
        values[:, : group.max_length].transpose(1, 2),
        attn_mask=group.mask(window, queries.dtype),
        scale=scaling,
    )
    return output.reshape(n, heads, head_dim)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attend for many queries of one sequence, all [tokens, heads, head_dim]; without a mask, causally."""
    output = scaled_dot_product_attention(
        queries.transpose(0, 1).unsqueeze(0),
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return output[0].transpose(0, 1)


AttentionInterface.register(ATTENTION_NAME, paged_attention)
