"""How each method's update begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.common.errors import InvalidArgument
from services.trainer.spec import TrainingSpec
from services.trainer.tokens import TokenRow
from services.trainer.training.adapter import TrainableAdapter
from services.trainer.training.base import SharedBase
from services.trainer.training.directions import main_directions
from services.trainer.training.forms import (
    BlockForm,
    DiagonalForm,
    LayerForm,
    PlainForm,
    ResidualForm,
    VectorForm,
)
from services.trainer.training.weights import base_weight

# VeRA's start of its diagonal, as in its reference settings.
VERA_D_INITIAL = 0.1
# Above this many rows or columns the largest singular components are found by iteration.
EXACT_SVD_LIMIT = 2048
_PARTS_OF_THE_BASE = frozenset({"olora", "pissa", "kasa", "miss", "bone", "eva"})
_SVD_OVERSAMPLING = 16
_SVD_ITERATIONS = 8


def new_adapter(
    base: SharedBase, spec: TrainingSpec, *, seed: int, rows: Sequence[TokenRow] = ()
) -> TrainableAdapter:
    """Return the update that a job begins with, drawn from `seed`; at first it changes nothing, but for KaSA.

    Args:
        rows: training rows, for a method that begins at their activations (EVA); without any it begins as
            LoRA, for weights that are loaded afterwards.

    Raises:
        InvalidArgument: `bad_hyperparameter`, where the rank is too large for a layer.
    """
    names = [name for name in base.linears if name.rpartition(".")[2] in spec.target_modules]
    start = _Start(base, spec, torch.Generator().manual_seed(seed), names)
    start.check_rank()
    if spec.method == "eva" and rows:
        forms = start.eva(rows)
    else:
        make = _METHODS[spec.method]
        forms = {name: make(start, base.linears[name]) for name in names}
    return TrainableAdapter(forms, base.linears, dropout=spec.dropout)


def update_scale(spec: TrainingSpec) -> float:
    """Return what B A is multiplied by."""
    return spec.alpha / (math.sqrt(spec.rank) if spec.method == "rslora" else spec.rank)


@dataclass(frozen=True, slots=True)
class _Start:
    base: SharedBase
    spec: TrainingSpec
    generator: torch.Generator
    names: list[str]

    @property
    def scale(self) -> float:
        return update_scale(self.spec)

    def check_rank(self) -> None:
        """Refuse a rank above what the base's layers have, where the update is a part of the base."""
        linears = [self.base.linears[name] for name in self.names]
        limit = min(min(linear.in_features, linear.out_features) for linear in linears)
        if self.spec.method in _PARTS_OF_THE_BASE and self.spec.rank >= limit:
            raise InvalidArgument(
                "bad_hyperparameter",
                f"rank is {self.spec.rank}; with method {self.spec.method} it must be below {limit} here",
                field="spec.rank",
                value=self.spec.rank,
                limit=limit,
            )

    def plain(self, linear: nn.Linear) -> LayerForm:
        return PlainForm(*self._drawn(linear), self.scale)

    def dora(self, linear: nn.Linear) -> LayerForm:
        magnitude = torch.linalg.norm(base_weight(linear), dim=1)
        return PlainForm(*self._drawn(linear), self.scale, magnitude)

    def olora(self, linear: nn.Linear) -> LayerForm:
        q, r = torch.linalg.qr(base_weight(linear))
        return ResidualForm(r[: self.spec.rank], q[:, : self.spec.rank], self.scale)

    def pissa(self, linear: nn.Linear) -> LayerForm:
        u, s, v = self._largest(base_weight(linear))
        root = (s / self.scale).sqrt()
        return ResidualForm(root[:, None] * v, u * root, self.scale)

    def kasa(self, linear: nn.Linear) -> LayerForm:
        u, s, v = torch.linalg.svd(base_weight(linear), full_matrices=False)
        kept = len(s) - self.spec.rank
        a, b = self._drawn(linear)
        diagonal = torch.randn(self.spec.rank, generator=self.generator).to(a.device)
        return DiagonalForm(a, b, diagonal, v[kept:], u[:, kept:] * s[kept:], self.scale)

    def vera(self, linear: nn.Linear) -> LayerForm:
        rank, device = self.spec.rank, self.base.device
        wide = max(self.base.linears[name].in_features for name in self.names)
        tall = max(self.base.linears[name].out_features for name in self.names)
        # The same two matrices for every layer, drawn anew for each and cut to its size.
        generator = torch.Generator().manual_seed(self.generator.initial_seed())
        shared_a = _kaiming((rank, wide), generator)
        shared_b = _kaiming((tall, rank), generator)
        return VectorForm(
            shared_a[:, : linear.in_features].to(device),
            shared_b[: linear.out_features].to(device),
            VERA_D_INITIAL,
        )

    def miss(self, linear: nn.Linear) -> LayerForm:
        return BlockForm(linear.in_features, linear.out_features, self.spec.rank, self.base.device)

    def eva(self, rows: Sequence[TokenRow]) -> dict[str, LayerForm]:
        forms: dict[str, LayerForm] = {}
        for name, directions in main_directions(self.base, self.names, rows, self.spec).items():
            b = torch.zeros(self.base.linears[name].out_features, len(directions), device=directions.device)
            forms[name] = PlainForm(directions, b, self.scale)
        return forms

    def _drawn(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return A uniform within 1 / sqrt(in_features) (as PEFT draws it) and B zero."""
        bound = 1.0 / math.sqrt(linear.in_features)
        a = torch.empty(self.spec.rank, linear.in_features).uniform_(-bound, bound, generator=self.generator)
        b = torch.zeros(linear.out_features, self.spec.rank)
        return a.to(self.base.device), b.to(self.base.device)

    def _largest(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the `rank` largest singular components: [out, rank], [rank], [rank, in]."""
        rank = self.spec.rank
        if min(weight.shape) <= EXACT_SVD_LIMIT:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            return u[:, :rank], s[:rank], v[:rank]
        # Halko et al. 2009, arXiv 0909.4061, algorithms 4.4 and 5.1.
        columns = min(rank + _SVD_OVERSAMPLING, min(weight.shape))
        drawn = torch.randn(weight.shape[1], columns, generator=self.generator).to(weight.device)
        span, _ = torch.linalg.qr(weight @ drawn)
        for _ in range(_SVD_ITERATIONS):
            across, _ = torch.linalg.qr(weight.T @ span)
            span, _ = torch.linalg.qr(weight @ across)
        u, s, v = torch.linalg.svd(span.T @ weight, full_matrices=False)
        return (span @ u)[:, :rank], s[:rank], v[:rank]


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a matrix uniform within sqrt(6 / columns), as PEFT draws VeRA's.

    He et al. 2015, arXiv 1502.01852.
    """
    bound = math.sqrt(6.0 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


_METHODS: dict[str, Callable[[_Start, nn.Linear], LayerForm]] = {
    "lora": _Start.plain,
    "rslora": _Start.plain,
    "eva": _Start.plain,
    "lora+": _Start.plain,
    "dora": _Start.dora,
    "olora": _Start.olora,
    "pissa": _Start.pissa,
    "miss": _Start.miss,
    "bone": _Start.miss,
    "vera": _Start.vera,
    "kasa": _Start.kasa,
}
