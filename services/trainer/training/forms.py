"""The trainable forms of a linear layer's update: each computes low-rank pairs from its parameters.

Every form is dW = sum of scale * B A on the untouched base. Methods that would change the base at the start
(PiSSA, OLoRA, KaSA) subtract the part they took as a second, frozen pair, so all jobs share one base and what
is published is
plain LoRA at the sum of the ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

# KaSA's weights of its two regularisers, as in its reference settings.
KASA_BETA = 1e-4
KASA_GAMMA = 1e-3


@dataclass(frozen=True, slots=True)
class Pair:
    """scale * B A: `a` is [rank, in_features], `b` [out_features, rank]. Dropout is for what is trained."""

    a: Tensor
    b: Tensor
    scale: float
    is_trained: bool = True


class LayerForm(ABC):
    """How one layer's update follows from what is trained.

    Attributes:
        parameters: what is trained, by name.
        constants: what is not, but belongs to the update and must survive a restart.
        magnitude: [out_features], the norms that the layer's rows are scaled to (DoRA), or None.
    """

    def __init__(self, parameters: dict[str, Tensor], constants: dict[str, Tensor] | None = None) -> None:
        self.parameters = {name: Parameter(tensor.contiguous()) for name, tensor in parameters.items()}
        self.constants = {name: tensor.contiguous() for name, tensor in (constants or {}).items()}

    @property
    def magnitude(self) -> Parameter | None:
        """The trained row norms, where the form has them."""
        return self.parameters.get("magnitude")

    @abstractmethod
    def pairs(self) -> list[Pair]:
        """Return the pairs that make up the update, as functions of the parameters."""

    def penalty(self) -> Tensor | None:
        """Return what the method adds to the loss of a step, or None."""
        return None


class PlainForm(LayerForm):
    """scale * B A: LoRA, rsLoRA, LoRA+ and EVA, and DoRA with a magnitude."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> None:
        super().__init__({"a": a, "b": b} | ({} if magnitude is None else {"magnitude": magnitude}))
        self._scale = scale

    def pairs(self) -> list[Pair]:
        return [Pair(self.parameters["a"], self.parameters["b"], self._scale)]


class ResidualForm(LayerForm):
    """scale * (B A - B0 A0): PiSSA and OLoRA, which begin at a part of the base and take it out there."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__({"a": a, "b": b}, {"a0": a.clone(), "b0": b.clone()})
        self._scale = scale

    def pairs(self) -> list[Pair]:
        return [
            Pair(self.parameters["a"], self.parameters["b"], self._scale),
            Pair(self.constants["a0"], self.constants["b0"], -self._scale, is_trained=False),
        ]


class DiagonalForm(LayerForm):
    """scale * B diag(s) A - N, with N the base's smallest components: KaSA.

    Wang et al. 2024, arXiv 2412.06071.
    """

    def __init__(
        self, a: Tensor, b: Tensor, diagonal: Tensor, noise_a: Tensor, noise_b: Tensor, scale: float
    ) -> None:
        super().__init__({"a": a, "b": b, "diagonal": diagonal}, {"noise_a": noise_a, "noise_b": noise_b})
        self._scale = scale

    def pairs(self) -> list[Pair]:
        scaled = self.parameters["diagonal"][:, None] * self.parameters["a"]
        return [
            Pair(scaled, self.parameters["b"], self._scale),
            Pair(self.constants["noise_a"], self.constants["noise_b"], -1.0, is_trained=False),
        ]

    def penalty(self) -> Tensor:
        """Equations 9 to 11: beta |s|^2 + gamma (|B^T B - I| + |A A^T - I|)."""
        a, b = self.parameters["a"], self.parameters["b"]
        one = torch.eye(a.shape[0], device=a.device)
        orthogonality = torch.linalg.norm(b.T @ b - one) + torch.linalg.norm(a @ a.T - one)
        total: Tensor = KASA_BETA * self.parameters["diagonal"].square().sum() + KASA_GAMMA * orthogonality
        return total


class VectorForm(LayerForm):
    """diag(b) B diag(d) A with drawn, shared A and B: VeRA.

    Kopiczko et al. 2023, arXiv 2310.11454, equation 2.
    """

    def __init__(self, shared_a: Tensor, shared_b: Tensor, d_initial: float) -> None:
        out_features, rank = shared_b.shape
        device = shared_a.device
        super().__init__(
            {
                "b": torch.zeros(out_features, device=device),
                "d": torch.full((rank,), d_initial, device=device),
            },
        )
        # Drawn again from the seed at a restart, so they are no constants to keep.
        self._shared_a, self._shared_b = shared_a, shared_b

    def pairs(self) -> list[Pair]:
        a = self.parameters["d"][:, None] * self._shared_a
        b = self.parameters["b"][:, None] * self._shared_b
        return [Pair(a, b, 1.0)]


class BlockForm(LayerForm):
    """B S with S summing every rank-th input: MiSS, once called Bone.

    Kang and Yin 2024, arXiv 2409.15371.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, device: torch.device) -> None:
        super().__init__({"b": torch.zeros(out_features, rank, device=device)})
        columns = torch.arange(in_features, device=device)
        self._sums = (columns[None, :] % rank == torch.arange(rank, device=device)[:, None]).float()

    def pairs(self) -> list[Pair]:
        return [Pair(self._sums, self.parameters["b"], 1.0)]
