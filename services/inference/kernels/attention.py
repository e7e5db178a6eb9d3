"""Attention of decoding sequences through the compiled kernel, over pages read where they lie."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from services.inference.kernels.library import Attention, Kernels
from services.inference.model.plain_attention import ScoreChanges


class KernelAttention:
    """The decode attention of one model's layers, for one thread."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._scores = torch.empty(0)

    def serves(self, queries: Tensor, keys: Tensor, changes: ScoreChanges) -> bool:
        """Whether the kernel can attend with these queries [tokens, heads, head_dim] to these pages."""
        return (
            not changes
            and queries.dtype is torch.float32
            and keys.dtype is torch.float32
            and queries.device.type == "cpu"
            and queries.shape[-1] % self._kernels.lanes == 0
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
        """Write softmax(scaling * q k^T) v of each sequence to its row of `output`.

        Args:
            output: [tokens, heads, head_dim], contiguous.
            queries: as `output`, of any strides but 1 in the head.
            pages: keys and values, each [blocks, block_size, kv_heads, head_dim].
            rows: [n] each sequence's row of queries and output.
            tables: [n, blocks] the sequences' pages.
            lengths: [n] the keys that each attends to, of which a window leaves the last.
            max_length: the largest of `lengths`.
            changes: none.
        """
        keys, values = pages
        assert self.serves(queries, keys, changes)
        assert all(tensor.is_contiguous() for tensor in (output, keys, values))
        threads = torch.get_num_threads()
        stride = -(-max_length // self._kernels.lanes) * self._kernels.lanes
        if self._scores.numel() < threads * stride:
            self._scores = torch.empty(threads * stride)
        _, block_size, kv_heads, head_dim = keys.shape
        record = Attention(
            query=queries.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            output=output.data_ptr(),
            rows=rows.data_ptr(),
            tables=tables.data_ptr(),
            lengths=lengths.data_ptr(),
            n=len(rows),
            width=tables.shape[1],
            token_stride=queries.stride(0),
            head_stride=queries.stride(1),
            heads=queries.shape[1],
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            window=window or 0,
            scaling=scaling,
        )
        self._kernels.decode_attention(ctypes.byref(record), self._scores.data_ptr(), stride, threads)
