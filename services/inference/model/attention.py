"""The attention seam: a flat batch of many sequences attends over paged KV.

The model runs on input ids [1, tokens]. Every attention layer calls `paged_attention`, which finds the step's
`AttentionStep` among the keyword arguments that transformers passes through, writes the new keys and values
into the pages, and attends: softmax(scaling * q k^T) v per sequence, causal, optionally within a sliding
window, with soft-capped scores and with sinks. Whatever else a model asks of its attention is refused.

No mask function is registered under our name, so transformers builds no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from services.common.errors import Unimplemented
from services.inference.model.kv import PagedKv
from services.inference.model.plain_attention import ScoreChanges, plain_attention

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


class DecodeKernel(Protocol):
    """What attends for decoding sequences in place of the torch form."""

    def serves(self, queries: Tensor, keys: Tensor, changes: ScoreChanges) -> bool:
        """Whether it can attend with these queries [tokens, heads, head_dim] to these pages."""
        ...

    def attend(
        self,
        output: Tensor,
        queries: Tensor,
        pages: tuple[Tensor, Tensor],
        rows: Tensor,
        tables: Tensor,
        lengths: Tensor,
        *,
        max_length: int,
        scaling: float,
        window: int | None,
        changes: ScoreChanges,
    ) -> None:
        """Write each sequence's attention to its row of `output`; `rows`, `tables`, `lengths` and
        `max_length` are those of a `DecodeGroup`.
        """
        ...


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What one step's attention needs: the pages, where new tokens go, and who looks at what.

    With a `kernel` it attends for the decoding sequences wherever it can. `layers` collects the layers that
    have attended, each with its window.
    """

    kv: PagedKv
    slots: Tensor
    decodes: Sequence[DecodeGroup]
    prefills: Sequence[PrefillSpan]
    kernel: DecodeKernel | None = None
    layers: dict[int, int | None] = field(default_factory=dict)


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend for one layer over the pages of `step`.

    Args:
        module: the layer's attention module; its `layer_idx` picks the pages.
        query: [1, heads, tokens, head_dim], rotated.
        key: [1, kv_heads, tokens, head_dim], rotated.
        value: as `key`.
        softcap, s_aux: see `ScoreChanges`; `s_aux` are the sinks.

    Returns:
        [1, tokens, heads, head_dim] and no weights.

    Raises:
        Unimplemented: `attention_feature_unsupported` for position biases, bidirectional attention, keys and
            values of unlike shapes, and all that is not known.
    """
    _refuse_extras(module, attention_mask, dropout, others)
    _refuse_shapes(step.kv, key, value)
    layer = module.layer_idx
    assert isinstance(layer, int)
    step.layers[layer] = sliding_window
    changes = ScoreChanges(softcap, s_aux)
    queries, keys, values = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    step.kv.write(layer, step.slots, keys, values)
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    for group in step.decodes:
        if step.kernel is not None and step.kernel.serves(queries, step.kv.keys[layer], changes):
            step.kernel.attend(
                output,
                queries,
                (step.kv.keys[layer], step.kv.values[layer]),
                group.rows,
                group.tables,
                group.lengths,
                max_length=group.max_length,
                scaling=queries.shape[-1] ** -0.5 if scaling is None else scaling,
                window=sliding_window,
                changes=changes,
            )
        else:
            rows = group.rows
            output[rows] = _decode(step.kv, layer, group, queries[rows], scaling, sliding_window, changes)
    for span in step.prefills:
        new = slice(span.start, span.start + span.length)
        if span.is_plain_causal(sliding_window):
            attended = _attend(queries[new], keys[new], values[new], None, scaling, changes)
        else:
            seen = span.context + span.length
            pages_k, pages_v = step.kv.read(layer, span.table)
            mask = span.mask(sliding_window)
            attended = _attend(queries[new], pages_k[0, :seen], pages_v[0, :seen], mask, scaling, changes)
        output[new] = attended
    return output.unsqueeze(0), None


# What transformers passes along that changes nothing here.
_HARMLESS = frozenset(
    {
        "cache_position",
        "is_causal",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def _refuse_extras(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, others: dict[str, object]
) -> None:
    found = [name for name, value in others.items() if name not in _HARMLESS and value is not None]
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        found.append("is_causal=False")
    if attention_mask is not None:
        found.append("attention_mask")
    if dropout:
        found.append("dropout")
    if found:
        raise _unsupported(", ".join(sorted(found)), sorted(found))


def _refuse_shapes(kv: PagedKv, key: Tensor, value: Tensor) -> None:
    wanted = (kv.shape.kv_heads, kv.shape.head_dim)
    for tensor in (key, value):
        shape = (tensor.shape[1], tensor.shape[3])
        if shape != wanted:
            raise _unsupported(
                f"keys or values of (heads, size) {shape} where its config says {wanted}", shape
            )


def _unsupported(what: str, value: object) -> Unimplemented:
    return Unimplemented(
        "attention_feature_unsupported",
        f"The base model's attention uses {what}, which this engine does not serve.",
        field="base",
        value=value,
    )


def _decode(
    kv: PagedKv,
    layer: int,
    group: DecodeGroup,
    queries: Tensor,
    scaling: float | None,
    window: int | None,
    changes: ScoreChanges,
) -> Tensor:
    """Attend for one query per sequence: queries [n, heads, head_dim] to [n, heads, head_dim].

    The query heads that share a KV head stand in the place of query positions, so keys are never repeated.
    """
    keys, values = kv.read(layer, group.tables)
    n, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.view(n, kv_heads, heads // kv_heads, head_dim)
    keys = keys[:, : group.max_length].transpose(1, 2)
    values = values[:, : group.max_length].transpose(1, 2)
    mask = group.mask(window, queries.dtype)
    if changes:
        scale = head_dim**-0.5 if scaling is None else scaling
        output = plain_attention(grouped.unsqueeze(3), keys, values, mask.unsqueeze(1), scale, changes)
    else:
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return output.reshape(n, heads, head_dim)


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    changes: ScoreChanges,
) -> Tensor:
    """Attend for many queries of one sequence, all [tokens, heads, head_dim]; without a mask, causally."""
    if changes:
        return _attend_plainly(queries, keys, values, mask, scaling, changes)
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


def _attend_plainly(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    changes: ScoreChanges,
) -> Tensor:
    length, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=queries.device).tril_()
    hidden = torch.zeros(mask.shape, device=queries.device).masked_fill_(~mask, -torch.inf)
    grouped = queries.transpose(0, 1).reshape(1, kv_heads, heads // kv_heads, length, head_dim)
    scale = head_dim**-0.5 if scaling is None else scaling
    output = plain_attention(
        grouped, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], hidden, scale, changes
    )
    return output.reshape(heads, length, head_dim).transpose(0, 1)


AttentionInterface.register(ATTENTION_NAME, paged_attention)
