"""What the format reader learns about an adapter."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class AdapterKind(enum.Enum):
    """What an adapter changes. The reader accepts `LORA`; the others are refused by these names."""

    LORA = "lora"
    LORA_BIAS = "lora+bias"
    LORA_SCALE = "lora+scale"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted linear layer: y += scale * B @ (A @ x), with A [rank, in] and B [out, rank].

    `name` is the layer's name in the base (`model.layers.0.self_attn.q_proj`).
    """

    name: str
    rank: int
    in_features: int
    out_features: int
    scale: float

    @property
    def num_parameters(self) -> int:
        """Values in A and B."""
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """A checked adapter.

    Attributes:
        kind: what it changes.
        modules: the adapted layers, sorted by name.
        targets: the distinct last parts of their names, sorted (`q_proj`).
        dtype: the one dtype of all tensors: F32, F16 or BF16 (F32 where there is no tensor).
        config_bytes, weights_bytes: sizes of the two files.
        config_digest, weights_digest: `sha256:<hex>` of the two files.
        declared_base: `base_model_name_or_path` as the config gives it: text, never followed.
        warnings: stable words; `noop_adapter` where the adapter changes nothing.
    """

    kind: AdapterKind
    modules: tuple[LoraModule, ...]
    targets: tuple[str, ...]
    dtype: str
    config_bytes: int
    weights_bytes: int
    config_digest: str
    weights_digest: str
    declared_base: str
    warnings: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Values in all A and B."""
        return sum(module.num_parameters for module in self.modules)

    @property
    def max_rank(self) -> int:
        """The largest rank; 0 for an adapter without tensors."""
        return max((module.rank for module in self.modules), default=0)
