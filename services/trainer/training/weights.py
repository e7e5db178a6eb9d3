"""The values of a frozen linear layer, whatever form it is kept in."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn


@torch.no_grad()
def base_weight(linear: nn.Linear) -> Tensor:
    """Return the layer's weight as float32 [out_features, in_features]; a 4-bit one is expanded."""
    weight = linear.weight
    if isinstance(weight, bnb.nn.Params4bit):
        expanded: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return expanded.to(torch.float32)
    return weight.detach().to(torch.float32)
