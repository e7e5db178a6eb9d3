"""Linear layers of a step through the compiled kernels: the base's part, and every row's adapter's."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.inference.adapters.tables import AdapterRows, AdapterTable, AdapterTables
from services.inference.kernels.library import MAX_PROJECTIONS, Kernels, Layer, Projection, Segment, Step

_ALIGNMENT_FLOATS = 16


@dataclass(frozen=True, slots=True)
class KernelLayer:
    """Up to three projections of one input, described for the kernel.

    Attributes:
        in_features: their common input width.
        out_features: the width of each.
    """

    in_features: int
    out_features: tuple[int, ...]
    record: Layer

    @classmethod
    def of(cls, modules: Sequence[tuple[int, nn.Linear]], *, with_base: bool) -> KernelLayer:
        """Describe linear layers of one input width, each with its row in the adapters' tables.

        Without the base the kernel changes what the output holds.
        """
        assert 0 < len(modules) <= MAX_PROJECTIONS
        in_features = modules[0][1].in_features
        projections = []
        for row, module in modules:
            assert module.in_features == in_features
            weight = bias = None
            if with_base:
                assert can_stream(module)
                weight = module.weight.data_ptr()
                bias = None if module.bias is None else module.bias.data_ptr()
            projections.append(Projection(weight, bias, module.out_features, row))
        record = Layer(in_features, len(modules), (Projection * MAX_PROJECTIONS)(*projections))
        return cls(in_features, tuple(module.out_features for _, module in modules), record)


def can_stream(module: nn.Linear) -> bool:
    """Whether the kernel can read the layer's own weights: plain float32 on the host."""
    weight, bias = module.weight, module.bias
    return (
        type(module) is nn.Linear
        and weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and (bias is None or (bias.dtype is torch.float32 and bias.is_contiguous()))
    )


class KernelLinear:
    """Runs layers for the rows of one step at a time. Owned by one model, used by one thread.

    `modules` gives each linear layer that adapters may change its row in their tables.

    Attributes:
        has_adapters: whether any row of the current step has one.
    """

    def __init__(self, kernels: Kernels, modules: Mapping[str, int]) -> None:
        self._linear = kernels.linear
        self._tables = AdapterTables(modules)
        self._step = Step()
        self._base_step = Step()
        self._packed = torch.empty(0)
        self._low = torch.empty(0)
        self._bound: tuple[object, ...] = ()
        self.has_adapters = False
        # A forward outside any step has no adapters; it may use as many threads as there are now.
        self.begin((), 0)

    def begin(self, rows: Sequence[AdapterRows], num_rows: int) -> None:
        """Bind the adapters of a step of `num_rows` rows."""
        assert all(item.end <= num_rows for item in rows)
        tables: list[AdapterTable] = self._tables.of(rows)
        used = list(zip(rows, tables, strict=True))
        segments = (Segment * len(used))(
            *(Segment(table.address, item.start, item.end) for item, table in used)
        )
        self._low = aligned_floats(
            self._low, MAX_PROJECTIONS * sum((item.end - item.start) * table.max_rank for item, table in used)
        )
        self._bound = (segments, tables)
        self.has_adapters = bool(used)
        self._step.segments = ctypes.addressof(segments)
        self._step.count = len(used)
        for step in (self._step, self._base_step):
            step.threads = torch.get_num_threads()
            step.packed = self._packed.data_ptr()
            step.low = self._low.data_ptr()

    def end(self) -> None:
        """Bind no adapter."""
        self._step.count = 0
        self._bound = ()
        self.has_adapters = False

    def project(self, layer: KernelLayer, x: Tensor) -> list[Tensor]:
        """Return W x + bias and the adapters' part, of x [..., in], as [..., out] for each projection."""
        return self._project(layer, x, self._step)

    def project_base(self, layer: KernelLayer, x: Tensor) -> list[Tensor]:
        """Return W x + bias alone, of x [..., in], as [..., out] for each projection."""
        return self._project(layer, x, self._base_step)

    def adapt(self, layer: KernelLayer, x: Tensor, y: Tensor) -> None:
        """Apply the adapters to y [..., out], in place, given the layer's input x [..., in]."""
        assert y.is_contiguous()
        x = x.contiguous()
        rows = x.numel() // layer.in_features
        self._call(layer, self._step, x, rows, [y])

    def step(self, in_features: int, rows: int) -> Step:
        """Return the current step's description, with room for layers of up to `in_features` and `rows`."""
        self._make_room(in_features, rows)
        return self._step

    def _make_room(self, in_features: int, rows: int) -> None:
        floats = in_features * -(-rows // _ALIGNMENT_FLOATS) * _ALIGNMENT_FLOATS
        if self._packed.numel() < floats:
            self._packed = aligned_floats(self._packed, floats)
            self._step.packed = self._base_step.packed = self._packed.data_ptr()

    def _project(self, layer: KernelLayer, x: Tensor, step: Step) -> list[Tensor]:
        x = x.contiguous()
        rows = x.numel() // layer.in_features
        self._make_room(layer.in_features, rows)
        outputs = [x.new_empty((*x.shape[:-1], width)) for width in layer.out_features]
        self._call(layer, step, x, rows, outputs)
        return outputs

    def _call(self, layer: KernelLayer, step: Step, x: Tensor, rows: int, outputs: Sequence[Tensor]) -> None:
        addresses: list[int | None] = [output.data_ptr() for output in outputs]
        addresses += [None] * (MAX_PROJECTIONS - len(outputs))
        self._linear(ctypes.byref(layer.record), ctypes.byref(step), x.data_ptr(), rows, *addresses)


def aligned_floats(scratch: Tensor, floats: int) -> Tensor:
    """Return `scratch`, or a larger one, that begins at a multiple of 64 bytes."""
    if scratch.numel() >= floats:
        return scratch
    room = torch.empty(floats + _ALIGNMENT_FLOATS, dtype=torch.float32)
    first = -(room.data_ptr() // room.itemsize) % _ALIGNMENT_FLOATS
    return room[first : first + floats]
