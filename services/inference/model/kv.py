"""The paged KV cache: the device memory behind the block tables."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

_EXTENT_BYTES_PER_LAYER = 1 << 16


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token of one sequence takes in the cache."""

    layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values of `block_size` tokens in all layers."""
        return 2 * self.layers * self.block_size * self.kv_heads * self.head_dim * self.dtype.itemsize

    @classmethod
    def of(cls, config: PretrainedConfig, block_size: int, dtype: torch.dtype) -> KvShape:
        """Read the shape from a transformers config."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            block_size=block_size,
            dtype=dtype,
        )


class PagedKv:
    """Keys and values, one pair of tensors per layer, each [num_blocks + 1, block_size, kv_heads, head_dim].

    The last block, `scratch_block`, is no sequence's: rows that only fill a step up write and read there.

    The tensors start as zeros: padded table entries are read and then masked, and a masked NaN would still
    spread.

    On a CPU the tensors are address space, and memory comes as blocks are written and goes with `release`. On
    a GPU they are memory from the start, and nothing is released: `is_elastic` is false.
    """

    def __init__(self, shape: KvShape, num_blocks: int, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_bytes = shape.block_bytes
        self.is_elastic = device.type == "cpu"
        self.scratch_block = num_blocks
        size = (num_blocks + 1, shape.block_size, shape.kv_heads, shape.head_dim)
        self._maps: list[mmap.mmap] = []
        self.extent_blocks = _extent_blocks(shape) if self.is_elastic else num_blocks
        self.keys = [self._zeros(size, device) for _ in range(shape.layers)]
        self.values = [self._zeros(size, device) for _ in range(shape.layers)]

    def release(self, extent: int) -> None:
        """Give the memory of `extent_blocks` blocks back to the system; they read as zeros again."""
        if not self.is_elastic:
            return
        block_bytes = self.block_bytes // (2 * self.shape.layers)
        start = extent * self.extent_blocks * block_bytes
        for pages in self._maps:
            pages.madvise(
                mmap.MADV_DONTNEED, start, min(self.extent_blocks * block_bytes, len(pages) - start)
            )

    def _zeros(self, size: tuple[int, int, int, int], device: torch.device) -> Tensor:
        dtype = self.shape.dtype
        if not self.is_elastic:
            return torch.zeros(size, dtype=dtype, device=device)
        pages = mmap.mmap(-1, max(math.prod(size) * dtype.itemsize, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A huge page would bring the memory of many blocks with the first of them.
        with suppress(OSError):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        self._maps.append(pages)
        return torch.frombuffer(pages, dtype=dtype).view(size)

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store `key` and `value` [tokens, kv_heads, head_dim] at `slots` [tokens], flat positions in the
        pages.
        """
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def read(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the pages of `tables` [sequences, blocks] as [sequences, blocks * block_size, kv_heads,
        head_dim].
        """
        sequences, blocks = tables.shape
        rows = tables.flatten()
        size = (sequences, blocks * self.shape.block_size, self.shape.kv_heads, self.shape.head_dim)
        keys = self.keys[layer].index_select(0, rows).view(size)
        values = self.values[layer].index_select(0, rows).view(size)
        return keys, values


def _extent_blocks(shape: KvShape) -> int:
    """Return how many blocks make an extent: whole pages of memory in every layer."""
    block_bytes = shape.block_bytes // (2 * shape.layers)
    pages = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, block_bytes)
    return pages * max(1, _EXTENT_BYTES_PER_LAYER // (pages * block_bytes))
