"""An adapter's weights: per-module pairs A and B, with the scale folded into B."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from services.common import adapter_format
from services.common.adapter_format import CONFIG_FILE, WEIGHTS_FILE, AdapterKind
from services.common.errors import FailedPrecondition
from services.inference.adapters.targets import LoraTargets

_TENSOR_NAME = "base_model.model.{module}.lora_{side}.weight"


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One module's update: A [rank, in] and B [out, rank], B already multiplied by the scale."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """All pairs of one adapter, keyed by the module's name in the base model."""

    pairs: Mapping[str, LoraPair]

    @property
    def size_bytes(self) -> int:
        """Bytes at the true rank of every module."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())

    @property
    def shape_key(self) -> tuple[tuple[str, int], ...]:
        """What two adapters must have in common to be stacked: the same modules at the same ranks."""
        return tuple(sorted((name, pair.rank) for name, pair in self.pairs.items()))

    def to(self, device: torch.device, *, non_blocking: bool = False) -> AdapterWeights:
        """Return the weights on `device`; they share memory with these where they are there already."""
        pairs = {
            name: LoraPair(
                pair.a.to(device, non_blocking=non_blocking), pair.b.to(device, non_blocking=non_blocking)
            )
            for name, pair in self.pairs.items()
        }
        return AdapterWeights(pairs)

    def pinned(self) -> AdapterWeights:
        """Return a copy in page-locked host memory, from which copies to a GPU are asynchronous."""
        return AdapterWeights(
            {name: LoraPair(pair.a.pin_memory(), pair.b.pin_memory()) for name, pair in self.pairs.items()}
        )


def read_adapter(folder: Path, targets: LoraTargets, dtype: torch.dtype) -> AdapterWeights:
    """Read the adapter in `folder` for a base with the given `targets`, as tensors of `dtype` on the host.

    The folder is checked as strictly as when it was published: a store is no reason to trust bytes.

    Raises:
        InvalidArgument, ResourceExhausted: with the reasons of `adapter_format.read_adapter`.
        FailedPrecondition: `unsupported_adapter_kind` for all but plain LoRA, `adapter_module_unsupported`
        for layers outside the decoder's layers, `adapter_empty`.
    """
    summary = adapter_format.read_adapter(
        (folder / CONFIG_FILE).read_bytes(), folder / WEIGHTS_FILE, base_modules=targets.module_table
    )
    if summary.kind is not AdapterKind.LORA:
        raise FailedPrecondition(
            "unsupported_adapter_kind",
            f"The adapter is of kind {summary.kind.value}; only {AdapterKind.LORA.value} is served.",
            field="weights",
            value=summary.kind.value,
            limit=AdapterKind.LORA.value,
        )
    if not summary.modules:
        raise FailedPrecondition("adapter_empty", "The adapter has no tensors.", field="weights")
    pairs = {}
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        for module in summary.modules:
            if module.name not in targets:
                raise FailedPrecondition(
                    "adapter_module_unsupported",
                    f"The adapter changes {module.name}; only linear layers of the decoder are served.",
                    field="weights",
                    value=module.name,
                )
            a = file.get_tensor(_TENSOR_NAME.format(module=module.name, side="A"))
            b = file.get_tensor(_TENSOR_NAME.format(module=module.name, side="B"))
            scaled = b.to(torch.float32) * module.scale
            pairs[module.name] = LoraPair(a.to(dtype), scaled.to(dtype))
    return AdapterWeights(pairs)


def adapter_size_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Return the bytes that `read_adapter` will take, from the header alone.

    Raises:
        InvalidArgument: with the reasons of `adapter_format.read_header`.
    """
    header = adapter_format.read_header(folder / WEIGHTS_FILE)
    return sum(math.prod(tensor.shape) for tensor in header.tensors) * dtype.itemsize
