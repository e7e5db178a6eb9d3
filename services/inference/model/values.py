"""The base's own values, for adapters that are read against them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn


class ModelValues:
    """The weights and biases of a loaded model's linear layers; see `BaseValues`.

    It reads while the model runs, and changes nothing.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], embedding: nn.Embedding) -> None:
        self._linears = linears
        self._embedding = embedding

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        layer = self._linears[name]
        if isinstance(layer, Linear4bit):
            dequantised: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            return dequantised.to(torch.float32)
        return layer.weight.detach().to(torch.float32)

    def bias(self, name: str) -> Tensor | None:
        bias = self._linears[name].bias
        return None if bias is None else bias.detach().to("cpu", torch.float32)

    def embedding_scale(self) -> float:
        # Gemma 3 scales inside its embedding; the others, if at all, outside.
        return float(getattr(self._embedding, "embed_scale", 1.0))
