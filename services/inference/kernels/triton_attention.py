# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
"""Attention of decoding sequences on a GPU, over pages read where they lie (Triton).

One query per sequence meets all its keys. So that a small batch fills the device, each sequence's keys are
split, and a second launch joins the parts by their running maxima and sums, as in Flash-Decoding (an online
softmax, arXiv 1805.02867, algorithm 3, over parts). The query heads of one KV head are computed together, so
keys and values are read once. Pages are found through the block table, as in PagedAttention (arXiv
2309.06180, section 4.1).
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

from services.inference.model.plain_attention import ScoreChanges

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_HEAD_DIM = 256
# Bytes of the keys of one round, and their least and largest number; tl.dot wants at least 16 rows of each.
_TILE_BYTES = 1 << 14
_LEAST_KEYS, _MOST_KEYS = 16, 64
_LEAST_GROUP = 16
# Programs that fill a GPU of some 130 multiprocessors, and most parts that one sequence is cut into.
_WANTED_PROGRAMS = 256
_MOST_SPLITS = 32


# Not specialised: no value of these may cost a compilation in the middle of traffic.
@triton.jit(do_not_specialize=["width", "window", "token_stride", "head_stride"])
def _attend_part(
    queries,
    keys,
    values,
    rows,
    tables,
    lengths,
    totals,
    maxima,
    sums,
    token_stride,
    head_stride,
    width,
    block_size,
    scaling,
    softcap,
    window,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    group_block: tl.constexpr,
    dim_block: tl.constexpr,
    key_block: tl.constexpr,
    has_softcap: tl.constexpr,
):
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(lengths + sequence).to(tl.int32)
    first = 0
    if window > 0:
        first = tl.maximum(length - window, 0)
    each = tl.cdiv(tl.cdiv(length - first, splits), key_block) * key_block
    begin = first + split * each
    end = tl.minimum(begin + each, length)

    heads = tl.arange(0, group_block)
    dims = tl.arange(0, dim_block)
    in_group, in_head = heads < group, dims < head_dim
    row = tl.load(rows + sequence)
    q = tl.load(
        queries
        + row * token_stride
        + (kv_head * group + heads)[:, None].to(tl.int64) * head_stride
        + dims[None, :],
        mask=in_group[:, None] & in_head[None, :],
        other=0.0,
    )
    maximum = tl.full((group_block,), float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros((group_block,), dtype=tl.float32)
    total = tl.zeros((group_block, dim_block), dtype=tl.float32)
    for start in range(begin, end, key_block):
        at = start + tl.arange(0, key_block)
        inside = at < end
        page = tl.load(tables + sequence * width + at // block_size, mask=inside, other=0).to(tl.int64)
        slot = (page * block_size + at % block_size) * kv_heads + kv_head
        places = slot[:, None] * head_dim + dims[None, :]
        there = inside[:, None] & in_head[None, :]
        k = tl.load(keys + places, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if has_softcap:
            # tanh(x) = 2 sigmoid(2 x) - 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(maximum - higher)
        weight_sum = weight_sum * shrink + tl.sum(weights, axis=1)
        v = tl.load(values + places, mask=there, other=0.0)
        total = total * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = higher
    part = (sequence * kv_heads + kv_head) * group * splits + heads * splits + split
    tl.store(maxima + part, maximum, mask=in_group)
    tl.store(sums + part, weight_sum, mask=in_group)
    tl.store(
        totals + part[:, None].to(tl.int64) * head_dim + dims[None, :],
        total,
        mask=in_group[:, None] & in_head[None, :],
    )


@triton.jit(do_not_specialize=["splits"])
def _join_parts(
    output,
    rows,
    totals,
    maxima,
    sums,
    sinks,
    splits,
    head_dim: tl.constexpr,
    dim_block: tl.constexpr,
    has_sinks: tl.constexpr,
):
    sequence, head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    dims = tl.arange(0, dim_block)
    in_head = dims < head_dim
    first = (sequence * heads + head) * splits
    # A sink takes its share of the weights and brings no value. The first part always has a key.
    maximum = tl.load(maxima + first)
    if has_sinks:
        sink = tl.load(sinks + head).to(tl.float32)
        maximum = tl.maximum(maximum, sink)
        weight_sum = tl.exp(sink - maximum)
    else:
        weight_sum = 0.0
    total = tl.zeros((dim_block,), dtype=tl.float32)
    for split in range(splits):
        part = first + split
        of_part = tl.load(maxima + part)
        higher = tl.maximum(maximum, of_part)
        shrink, share = tl.exp(maximum - higher), tl.exp(of_part - higher)
        weight_sum = weight_sum * shrink + tl.load(sums + part) * share
        values = tl.load(totals + part.to(tl.int64) * head_dim + dims, mask=in_head, other=0.0)
        total = total * shrink + values * share
        maximum = higher
    row = tl.load(rows + sequence)
    tl.store(
        output + (row * heads + head) * head_dim + dims,
        (total / weight_sum).to(output.dtype.element_ty),
        mask=in_head,
    )


class TritonAttention:
    """The decode attention of one model's layers on a GPU. It keeps nothing from call to call."""

    def serves(self, queries: Tensor, keys: Tensor, changes: ScoreChanges) -> bool:
        """Whether the kernel can attend with these queries [tokens, heads, head_dim] to these pages, whatever
        the `changes`.
        """
        return (
            queries.dtype in _DTYPES
            and keys.dtype == queries.dtype
            and queries.shape[-1] <= _MOST_HEAD_DIM
            and queries.stride(-1) == 1
        )

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
        """Write softmax(cap(scaling * q k^T)) v of each sequence to its row of `output`; sums in float32.

        Args:
            output: [tokens, heads, head_dim], contiguous.
            queries: as `output`, of any strides but 1 in the head.
            pages: keys and values, each [blocks, block_size, kv_heads, head_dim].
            rows: [n] each sequence's row of queries and output.
            tables: [n, blocks] the sequences' pages.
            lengths: [n] the keys that each attends to, one or more, of which a window leaves the last.
            max_length: at least the largest of `lengths`.
            changes: soft cap and sinks.
        """
        keys, values = pages
        assert self.serves(queries, keys, changes)
        assert all(tensor.is_contiguous() for tensor in (output, keys, values, rows, tables, lengths))
        assert window is None or window > 0
        _, block_size, kv_heads, head_dim = keys.shape
        n, heads = len(rows), queries.shape[1]
        group = heads // kv_heads
        dim_block = max(16, triton.next_power_of_2(head_dim))
        key_block = min(max(_TILE_BYTES // (dim_block * keys.element_size()), _LEAST_KEYS), _MOST_KEYS)
        seen = max_length if window is None else min(window, max_length)
        splits = _count_splits(n * kv_heads, -(-seen // key_block))
        device = queries.device
        totals = torch.empty((n, heads, splits, head_dim), dtype=torch.float32, device=device)
        maxima = torch.empty((n, heads, splits), dtype=torch.float32, device=device)
        sums = torch.empty_like(maxima)
        _attend_part[(n, kv_heads, splits)](
            queries,
            keys,
            values,
            rows,
            tables,
            lengths,
            totals,
            maxima,
            sums,
            queries.stride(0),
            queries.stride(1),
            tables.shape[1],
            block_size,
            scaling,
            changes.softcap or 1.0,
            window or 0,
            group,
            head_dim,
            max(_LEAST_GROUP, triton.next_power_of_2(group)),
            dim_block,
            key_block,
            changes.softcap is not None,
        )
        _join_parts[(n, heads)](
            output,
            rows,
            totals,
            maxima,
            sums,
            output if changes.sinks is None else changes.sinks.contiguous(),
            splits,
            head_dim,
            dim_block,
            changes.sinks is not None,
        )


def _count_splits(programs: int, key_blocks: int) -> int:
    """Return into how many parts the longest sequence's `key_blocks` are cut, so that `programs` for each
    part fill the device. Shorter sequences may leave some empty.
    """
    return min(-(-_WANTED_PROGRAMS // programs), key_blocks, _MOST_SPLITS)
