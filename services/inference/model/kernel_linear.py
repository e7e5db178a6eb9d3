"""The linear seam on the compiled kernels: what `install_lora` made, with the work done by `KernelLinear`.

Steps of few rows read the base's weights through the kernel, larger ones through the library's product; the
adapters' part is the kernel's in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from services.inference.kernels.library import Kernels
from services.inference.kernels.linear import KernelLayer, KernelLinear, can_stream
from services.inference.model.linear import LoraHead, LoraLinear, StepBinding

# Layers that take the same input in every architecture that has them; one call computes them all.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharedInput:
    """Layers that take the same input. The first that is called computes all, the others take their part."""

    def __init__(self, kernel: KernelLinear, modules: Sequence[tuple[int, nn.Linear]]) -> None:
        self._kernel = kernel
        self._together = KernelLayer.of(modules, with_base=True)
        self._alone = [KernelLayer.of([module], with_base=True) for module in modules]
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def project(self, position: int, x: Tensor) -> Tensor:
        """Return the output of the layer at `position` for x."""
        if len(self._alone) == 1:
            return self._kernel.project(self._together, x)[0]
        if position == 0:
            self._input, self._outputs = x, list(self._kernel.project(self._together, x))
        output = self._outputs[position] if self._input is x else None
        if output is None:
            return self._kernel.project(self._alone[position], x)[0]
        self._outputs[position] = None
        if not any(other is not None for other in self._outputs):
            self._input = None
        return output


class KernelLoraLinear(LoraLinear):
    """A linear layer of the base and its rows' adapters, computed by the kernels."""

    def __init__(
        self, twin: LoraLinear, binding: StepBinding, kernel: KernelLinear, row: int, max_rows: int
    ) -> None:
        super().__init__(twin.base, twin.name, binding)
        self.row = row
        self._kernel = kernel
        self._max_rows = max_rows
        self._adapters_only = KernelLayer.of([(row, twin.base)], with_base=False)
        self._shared: SharedInput | None = None
        self._position = 0

    @property
    def streams(self) -> bool:
        """Whether the kernel reads the base's weights."""
        return self._shared is not None

    def share(self, shared: SharedInput, position: int) -> None:
        """Stream the base's weights, together with the layers of `shared`, where this one has `position`."""
        self._shared, self._position = shared, position

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]; all dimensions but the last make the flat batch's rows."""
        if self._shared is not None and x.numel() <= self._max_rows * x.shape[-1]:
            return self._shared.project(self._position, x)
        y: Tensor = self.base(x)
        if self._kernel.has_adapters:
            self._kernel.adapt(self._adapters_only, x, y)
        return y


class StreamedLinear(nn.Module):
    """A linear layer of the base that no adapter changes through the kernels."""

    def __init__(self, base: nn.Linear, kernel: KernelLinear, max_rows: int) -> None:
        super().__init__()
        self.base = base
        self._kernel = kernel
        self._max_rows = max_rows
        self._layer = KernelLayer.of([(0, base)], with_base=True)

    @property
    def weight(self) -> Tensor:
        """The layer's own weight."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        if x.numel() <= self._max_rows * x.shape[-1]:
            return self._kernel.project_base(self._layer, x)[0]
        y: Tensor = self.base(x)
        return y


def install_kernels(model: PreTrainedModel, binding: StepBinding, kernels: Kernels) -> KernelLinear:
    """Put the kernels in the place of the torch forms in every layer that `install_lora` has wrapped.

    The model computes in float32 on a CPU.
    """
    twins = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    rows = {name: row for row, name in enumerate(twins)}
    kernel = KernelLinear(kernels, rows)
    max_rows = kernels.rows_per_pass
    made = {
        name: KernelLoraLinear(twin, binding, kernel, rows[name], max_rows) for name, twin in twins.items()
    }
    for names in _together(list(twins)):
        bases = [twins[name].base for name in names]
        same_input = len({base.in_features for base in bases}) == 1
        streamed = [[name] for name in names if can_stream(twins[name].base)]
        if same_input and len(streamed) == len(names):
            streamed = [names]
        for group in streamed:
            shared = SharedInput(kernel, [(rows[name], twins[name].base) for name in group])
            for position, name in enumerate(group):
                made[name].share(shared, position)
    for name, module in made.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    for module in model.modules():
        if isinstance(module, LoraHead) and isinstance(module.base, nn.Linear) and can_stream(module.base):
            module.base = StreamedLinear(module.base, kernel, max_rows)
    binding.kernel = kernel
    return kernel


def kernels_serve(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can compute a model of this type on this device."""
    return dtype is torch.float32 and device.type == "cpu"


def _together(names: Sequence[str]) -> list[list[str]]:
    """Split the names into groups of layers that share their input; most are alone."""
    there = set(names)
    groups: list[list[str]] = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        siblings = next((group for group in _SIBLINGS if leaf in group), (leaf,))
        full = [f"{parent}.{sibling}" for sibling in siblings]
        if any(sibling not in there for sibling in full):
            groups.append([name])
        elif leaf == siblings[0]:
            groups.append(full)
    return groups
