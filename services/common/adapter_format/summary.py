"""What the format reader learns about an adapter."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class AdapterKind(enum.Enum):
    """What an adapter has: low-rank updates, or with them biases, magnitudes (DoRA) or an output head."""

    LORA = "lora"
    LORA_BIAS = "lora+bias"
    LORA_SCALE = "lora+scale"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted linear layer: y += scale * B @ (A @ x), with A [rank, in] and B [out, rank].

    `name` is the layer's name in the base (`model.layers.0.self_attn.q_proj`); `num_vector_parameters` counts
    the values of its biases and magnitudes. An embedding is the same with one-hot rows x: `in_features` is
    the vocabulary.
    """

    name: str
    rank: int
    in_features: int
    out_features: int
    scale: float
    num_vector_parameters: int = 0
    is_embedding: bool = False

    @property
    def num_parameters(self) -> int:
        """Values in A and B, and in the vectors."""
        return self.rank * (self.in_features + self.out_features) + self.num_vector_parameters


@dataclass(frozen=True, slots=True)
class OutputHead:
    """A whole layer in place of the base's output: `lm_head`, or `score` or `classifier`, one row a label."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool

    @property
    def num_parameters(self) -> int:
        """Values in the weight and the bias."""
        return self.out_features * (self.in_features + self.has_bias)


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """A checked adapter.

    Attributes:
        kind: what it changes.
        modules: the adapted layers, sorted by name.
        head: the output head, for the kind `HEAD`.
        targets: the distinct last parts of their names, sorted (`q_proj`).
        dtype: the one dtype of all A and B: F32, F16 or BF16 (F32 where there is none). Vectors and heads may
            have another of the three.
        config_bytes, weights_bytes: sizes of the two files.
        config_digest, weights_digest: `sha256:<hex>` of the two files.
        declared_base: `base_model_name_or_path` as the config gives it: text, never followed.
        warnings: stable words; `noop_adapter` where the adapter changes nothing.
    """

    kind: AdapterKind
    modules: tuple[LoraModule, ...]
    head: OutputHead | None
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
        """Values in all tensors."""
        head = 0 if self.head is None else self.head.num_parameters
        return head + sum(module.num_parameters for module in self.modules)

    @property
    def max_rank(self) -> int:
        """The largest rank; 0 for an adapter without tensors."""
        return max((module.rank for module in self.modules), default=0)
