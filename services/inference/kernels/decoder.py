"""Whole decoder layers through the compiled kernel, in steps where every sequence adds one token."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.inference.kernels.library import (
    Attention,
    DecoderLayer,
    DecodeStep,
    Kernels,
    Norm,
    Workspace,
)
from services.inference.kernels.linear import KernelLayer, KernelLinear, aligned_floats


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """A decoder layer of the Llama kind, taken apart.

    Attributes:
        qkv, o, gate_up, down: its linear layers.
        norms: before the attention, before the multi-layer perceptron, of the query heads and of the key
            heads: weight and epsilon, or None where the model has none.
        window: keys that a query sees; None for all.
    """

    qkv: KernelLayer
    o: KernelLayer
    gate_up: KernelLayer
    down: KernelLayer
    norms: tuple[tuple[Tensor, float] | None, ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    scaling: float

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Hidden size, widths of queries and of keys, intermediate size."""
        return (
            self.qkv.in_features,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.down.in_features,
        )

    def record(self) -> DecoderLayer:
        """Describe the layer for the kernel."""
        norms = [
            Norm() if norm is None else Norm(norm[0].data_ptr(), norm[1])  # one per part, in order
            for norm in self.norms
        ]
        return DecoderLayer(
            self.qkv.record,
            self.o.record,
            self.gate_up.record,
            self.down.record,
            *norms,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.window or 0,
            self.scaling,
        )


@dataclass(frozen=True, slots=True)
class DecodingRows:
    """Sequences that each add one token: rows, tables and lengths as `DecodeGroup` has them."""

    rows: Tensor
    tables: Tensor
    lengths: Tensor
    max_length: int


class KernelDecoder:
    """Runs the decoder layers of one model. Owned by the model, used by one thread."""

    def __init__(self, kernels: Kernels, linear: KernelLinear) -> None:
        self._kernels = kernels
        self._linear = linear
        self._step = DecodeStep()
        self._step_of: tuple[object, Tensor] | None = None
        self._kept: tuple[object, ...] = ()
        self._room = torch.empty(0)
        self._scores = torch.empty(0)
        self.max_rows = kernels.rows_per_pass

    def serves(self, parts: DecoderParts) -> bool:
        """Whether the kernel can compute layers of these sizes."""
        sizes = (*parts.widths, parts.head_dim)
        return all(size % self._kernels.lanes == 0 for size in sizes) and parts.head_dim % 2 == 0

    def begin(
        self,
        key: object,
        parts: DecoderParts,
        groups: Sequence[DecodingRows],
        slots: Tensor,
        rotation: tuple[Tensor, Tensor],
        block_size: int,
    ) -> None:
        """Prepare a step; without effect where `key` and the rotation are those of the step before.

        Args:
            parts: any layer of the model, all of which have the same sizes.
            groups: the sequences.
            slots: [rows] the flat positions in the pages of the new keys and values.
            rotation: cosine and sine [1, rows, head_dim] of each row's position.
        """
        cos, sin = rotation
        if self._step_of is not None and self._step_of[0] is key and self._step_of[1] is cos:
            return
        threads, rows = torch.get_num_threads(), len(slots)
        stride = -(-max(group.max_length for group in groups) // self._kernels.lanes) * self._kernels.lanes
        self._scores = aligned_floats(self._scores, threads * stride)
        records = (Attention * len(groups))(
            *(
                Attention(
                    rows=group.rows.data_ptr(),
                    tables=group.tables.data_ptr(),
                    lengths=group.lengths.data_ptr(),
                    n=len(group.rows),
                    width=group.tables.shape[1],
                    block_size=block_size,
                )
                for group in groups
            )
        )
        cos, sin = cos.contiguous(), sin.contiguous()
        linear = self._linear.step(max(parts.widths), rows)
        self._step = DecodeStep(
            ctypes.addressof(linear),
            ctypes.addressof(records),
            len(groups),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            self._workspace(parts, rows, stride),
        )
        self._step_of = (key, rotation[0])
        self._kept = (linear, records, groups, cos, sin, slots)

    def layer(self, record: DecoderLayer, x: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        """Return the layer's output for x [1, rows, hidden]; `pages` are its keys and values."""
        x = x.contiguous()
        y = torch.empty_like(x)
        keys, values = pages
        self._kernels.decoder_layer(
            ctypes.byref(record),
            ctypes.byref(self._step),
            x.data_ptr(),
            x.shape[1],
            keys.data_ptr(),
            values.data_ptr(),
            y.data_ptr(),
        )
        return y

    def _workspace(self, parts: DecoderParts, rows: int, stride: int) -> Workspace:
        hidden, queries, keys, intermediate = parts.widths
        widths = (hidden, queries, keys, keys, queries, hidden, intermediate, intermediate)
        self._room = aligned_floats(self._room, rows * sum(widths))
        addresses = []
        first = self._room.data_ptr()
        for width in widths:
            addresses.append(first)
            first += rows * width * self._room.itemsize
        return Workspace(*addresses, self._scores.data_ptr(), stride)


def norm_of(module: nn.Module) -> tuple[Tensor, float] | None:
    """Return weight and epsilon of what looks like a root mean square normalisation; None for all else."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        return None
    plain = weight.dtype is torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()
    return (weight, epsilon) if plain and weight.dim() == 1 else None
