"""The linear seam with the adapters' part computed by Triton on a GPU."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from services.inference.kernels.triton_lora import TritonLora
from services.inference.model.linear import LoraLinear, StepBinding


class TritonLoraLinear(LoraLinear):
    """A linear layer of the base, called unchanged, and its rows' adapters, computed by Triton."""

    def __init__(self, twin: LoraLinear, binding: StepBinding, lora: TritonLora) -> None:
        super().__init__(twin.base, twin.name, binding)
        self._lora = lora

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]; all dimensions but the last make the flat batch's rows."""
        y: Tensor = self.base(x)
        if self._lora.has_adapters:
            self._lora.adapt(self.name, x, y)
        return y


def install_triton(
    model: PreTrainedModel, binding: StepBinding, *, max_rows: int, max_adapters: int
) -> TritonLora:
    """Put Triton in the place of the torch form in every layer of the decoder that adapters may change, for
    steps of up to `max_rows` tokens and `max_adapters` adapters.
    """
    twins = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    rows = {name: row for row, name in enumerate(twins)}
    lora = TritonLora(rows, model.device, max_rows=max_rows, max_adapters=max_adapters)
    for name, twin in twins.items():
        parent, _, leaf = name.rpartition(".")
        module: nn.Module = TritonLoraLinear(twin, binding, lora)
        setattr(model.get_submodule(parent), leaf, module)
    binding.kernel = lora
    return lora
