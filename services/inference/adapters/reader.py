"""Reads an adapter's folder into the weights that the engine uses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from services.common import adapter_format
from services.common.adapter_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterKind,
    AdapterSummary,
    LoraModule,
    OutputHead,
)
from services.common.errors import FailedPrecondition, InvalidArgument
from services.inference.adapters.targets import LoraTargets
from services.inference.adapters.weights import AdapterWeights, EmbeddingDelta, HeadDelta, LoraPair

_PREFIX = "base_model.model."
_B_BIAS = ".lora_B.bias"
_BASE_BIAS = ".base_layer.bias"
_MAGNITUDE = ".lora_magnitude_vector"


class _Tensors:
    """The tensors of a file, read one at a time."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = frozenset(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.get(name)
        assert tensor is not None, name
        return tensor

    def get(self, name: str) -> Tensor | None:
        """Return a tensor; None where the file has none of that name."""
        if name not in self._names:
            return None
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def read_adapter(folder: Path, targets: LoraTargets, dtype: torch.dtype) -> AdapterWeights:
    """Read the adapter in `folder` for a base with the given `targets`, as tensors of `dtype` on the host.

    The folder is checked as strictly as when it was published: a store is no reason to trust bytes.

    Raises:
        InvalidArgument, ResourceExhausted: with the reasons of `adapter_format.read_adapter`.
        FailedPrecondition: `adapter_module_unsupported` (see `LoraTargets.check_linear`),
            `unsupported_adapter_kind` for an output head that is not the base's (a classifier),
            `adapter_empty`.
    """
    summary = adapter_format.read_adapter((folder / CONFIG_FILE).read_bytes(), folder / WEIGHTS_FILE)
    _check(summary, targets)
    pairs: dict[str, LoraPair] = {}
    head: HeadDelta | None = None
    embedding: EmbeddingDelta | None = None
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        tensors = _Tensors(file)
        for module in summary.modules:
            if module.is_embedding:
                embedding = _embedding(module, tensors, targets, dtype)
            elif module.name == targets.head[0]:
                head = HeadDelta(pair=_pair(module, tensors, targets, dtype))
            else:
                pairs[module.name] = _pair(module, tensors, targets, dtype)
        if summary.head is not None:
            head = _whole_head(summary.head, tensors, dtype)
    return AdapterWeights(pairs, head, embedding)


def adapter_size_bytes(folder: Path, targets: LoraTargets, dtype: torch.dtype) -> int:
    """Return the bytes that `read_adapter` will take, from the header alone.

    Raises:
        InvalidArgument: with the reasons of `adapter_format.read_header`.
    """
    header = adapter_format.read_header(folder / WEIGHTS_FILE)
    num_values = 0
    # Both biases of a layer are one shift, and a gain makes one where the base has a bias.
    shifts: dict[str, int] = {}
    for tensor in header.tensors:
        size = math.prod(tensor.shape)
        module = tensor.name.removeprefix(_PREFIX)
        if module.endswith((_B_BIAS, _BASE_BIAS)):
            shifts[module.removesuffix(_B_BIAS).removesuffix(_BASE_BIAS)] = size
            continue
        num_values += size
        if module.endswith(_MAGNITUDE):
            module = module.removesuffix(_MAGNITUDE)
            if module in targets and targets.values.bias(module) is not None:
                shifts[module] = size
    return (num_values + sum(shifts.values())) * dtype.itemsize


def _check(summary: AdapterSummary, targets: LoraTargets) -> None:
    for module in summary.modules:
        shape = (module.in_features, module.out_features)
        if module.is_embedding:
            targets.check_embedding(module.name, shape)
        else:
            targets.check_linear(module.name, shape)
    head = summary.head
    if head is not None:
        if head.name != targets.head[0]:
            raise FailedPrecondition(
                "unsupported_adapter_kind",
                f"The adapter brings the output head {head.name}; the base has {targets.head[0]}.",
                field="weights",
                value=AdapterKind.HEAD.value,
                limit=targets.head[0],
            )
        targets.check_linear(head.name, (head.in_features, head.out_features))
        if head.has_bias != (targets.values.bias(head.name) is not None):
            which = "has no bias" if head.has_bias else "has a bias"
            message = f"The base's output head {head.name} {which}; the adapter's differs."
            raise InvalidArgument("base_mismatch", message, field="weights", value=head.name)
    if not summary.modules and head is None:
        raise FailedPrecondition("adapter_empty", "The adapter has no tensors.", field="weights")


def _pair(module: LoraModule, tensors: _Tensors, targets: LoraTargets, dtype: torch.dtype) -> LoraPair:
    stem = f"{_PREFIX}{module.name}"
    a = tensors[f"{stem}.lora_A.weight"].to(torch.float32)
    b = tensors[f"{stem}.lora_B.weight"].to(torch.float32) * module.scale
    gain: Tensor | None = None
    shift: Tensor | None = None
    magnitude = tensors.get(stem + _MAGNITUDE)
    if magnitude is not None:
        gain = _gain(magnitude.to(torch.float32), targets.values.weight(module.name), a, b)
        b = gain[:, None] * b
        base_bias = targets.values.bias(module.name)
        if base_bias is not None:
            shift = (1.0 - gain) * base_bias
    else:
        shift = _shift(module, tensors, targets)
    return LoraPair(
        a.to(dtype),
        # Stored as its transpose, in whose order the kernels and the library's products read it.
        b.T.contiguous().to(dtype).T,
        None if gain is None else gain.to(dtype),
        None if shift is None else shift.to(dtype),
    )


def _gain(magnitude: Tensor, weight: Tensor, a: Tensor, scaled_b: Tensor) -> Tensor:
    """m / ||W + s B A|| per output (DoRA, Liu et al. 2024, arXiv 2402.09353, equation 5; W is [out, in], so
    the norm that the paper takes of columns is one of rows here).
    """
    adapted = torch.addmm(weight, scaled_b.to(weight.device), a.to(weight.device))
    norm: Tensor = torch.linalg.vector_norm(adapted, dim=1)
    return magnitude / norm.to(magnitude.device)


def _shift(module: LoraModule, tensors: _Tensors, targets: LoraTargets) -> Tensor | None:
    """Return s * (bias of B), plus the trained bias of the base's layer less the base's own."""
    stem = f"{_PREFIX}{module.name}"
    b_bias, trained = tensors.get(stem + _B_BIAS), tensors.get(stem + _BASE_BIAS)
    shift = None if b_bias is None else b_bias.to(torch.float32) * module.scale
    if trained is not None:
        own = targets.values.bias(module.name)
        if own is None:
            name = stem + _BASE_BIAS
            message = f"Tensor {name} is a bias, and the base's layer {module.name} has none."
            raise InvalidArgument("base_mismatch", message, field="weights", value=name)
        change = trained.to(torch.float32) - own
        shift = change if shift is None else shift + change
    return shift


def _embedding(
    module: LoraModule, tensors: _Tensors, targets: LoraTargets, dtype: torch.dtype
) -> EmbeddingDelta:
    stem = f"{_PREFIX}{module.name}"
    a = tensors[f"{stem}.lora_embedding_A"]
    b = tensors[f"{stem}.lora_embedding_B"].to(torch.float32)
    scale = module.scale * targets.values.embedding_scale()
    return EmbeddingDelta(a.T.contiguous().to(dtype), (b * scale).to(dtype))


def _whole_head(head: OutputHead, tensors: _Tensors, dtype: torch.dtype) -> HeadDelta:
    bias = tensors.get(f"{_PREFIX}{head.name}.bias")
    weight = tensors[f"{_PREFIX}{head.name}.weight"]
    return HeadDelta(weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))
