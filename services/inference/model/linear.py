"""The linear seam: every linear layer of the decoder gets the rows' adapters added to its output."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from services.inference.adapters.ops import AdapterGroup, add_lora
from services.inference.adapters.targets import LoraTargets


class StepBinding:
    """Which adapters the rows of the current step use. Owned by one model; set by its runner around each
    step.
    """

    def __init__(self) -> None:
        self.groups: tuple[AdapterGroup, ...] = ()


class LoraLinear(nn.Module):
    """A linear layer of the base, plus B A x for each row's adapter.

    `base` may be a full-precision or a bitsandbytes 4-bit layer; it is called unchanged. Without adapters in
    the step nothing is added and nothing is paid.
    """

    def __init__(self, base: nn.Linear, name: str, binding: StepBinding) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._binding = binding

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, tokens, in] to [1, tokens, out]."""
        y: Tensor = self.base(x)
        groups = self._binding.groups
        if groups:
            add_lora(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), groups, self.name)
        return y


def install_lora(model: PreTrainedModel) -> tuple[StepBinding, LoraTargets]:
    """Put a `LoraLinear` around every linear layer inside the decoder's layers of `model`.

    Linear layers outside them (the output head) are left alone and listed in `LoraTargets.others`, so that an
    adapter for them is refused by name.
    """
    binding = StepBinding()
    shapes: dict[str, tuple[int, int]] = {}
    layers = model.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)
    inside = {id(module) for module in layers.modules()}
    others: dict[str, tuple[int, int]] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and id(module) in inside:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoraLinear(module, name, binding))
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, nn.Linear):
            others[name] = (module.in_features, module.out_features)
    return binding, LoraTargets(shapes, others)
