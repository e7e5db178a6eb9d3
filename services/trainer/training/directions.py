"""The main directions of the inputs of layers, and how many of them each layer gets (EVA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.trainer.spec import TrainingSpec
from services.trainer.tokens import TokenRow
from services.trainer.training.base import SharedBase
from services.trainer.training.batches import flatten

CALIBRATION_ROWS = 32
# A layer gets at most this many times the mean rank.
MAX_RANK_FACTOR = 2
# Tokens of a row's inputs that are looked at.
TOKENS_PER_PASS = 256


@dataclass(slots=True)
class _Sketch:
    """The largest singular directions of all inputs so far: [directions, in_features], by weight."""

    weighted: Tensor
    energy: float = 0.0

    def take(self, inputs: Tensor, directions: int) -> None:
        self.energy += float(inputs.square().sum())
        _, values, vectors = torch.linalg.svd(torch.cat([self.weighted, inputs]), full_matrices=False)
        self.weighted = values[:directions, None] * vectors[:directions]

    @property
    def shares(self) -> Tensor:
        """Share of the inputs' energy in each direction, falling."""
        return self.weighted.square().sum(dim=1) / self.energy


@torch.no_grad()
def main_directions(
    base: SharedBase, names: Sequence[str], rows: Sequence[TokenRow], spec: TrainingSpec
) -> dict[str, Tensor]:
    """Return orthonormal directions [rank of the layer, in_features] of each layer's inputs on `rows`.

    Paischer et al. 2024, arXiv 2410.07170, section 3: the directions that explain most, over all layers, get
    the ranks.
    The ranks add up to `spec.rank` a layer, and every layer gets at least one.
    """
    assert rows, "there are inputs to look at"
    sketches: dict[str, _Sketch] = {}
    shared: dict[str, str] = {}
    wanted = frozenset(names)
    directions = MAX_RANK_FACTOR * spec.rank
    # Layers that read one tensor share a sketch; it is kept, so that no other tensor can take its place.
    last: tuple[str, Tensor] | None = None

    def record(name: str, inputs: Tensor) -> None:
        nonlocal last
        if name not in wanted:
            return
        if last is not None and last[1] is inputs:
            shared[name] = last[0]
            return
        last = (name, inputs)
        flat = inputs.reshape(-1, inputs.shape[-1])
        chosen = flat[:: -(-len(flat) // TOKENS_PER_PASS)].float()
        shared[name] = name
        sketch = sketches.setdefault(name, _Sketch(chosen.new_zeros((0, chosen.shape[1]))))
        sketch.take(chosen, directions)

    with base.recording(record):
        for index in range(min(len(rows), CALIBRATION_ROWS)):
            base.counted_logits(flatten([rows[index]]))
            last = None
    ranks = distribute({name: sketches[shared[name]].shares for name in names}, spec.rank)
    return {
        name: torch.nn.functional.normalize(sketches[shared[name]].weighted[: ranks[name]], dim=1)
        for name in names
    }


def distribute(shares: dict[str, Tensor], mean_rank: int) -> dict[str, int]:
    """Return a rank for each layer: one, and the rest where directions explain most; `mean_rank` on average.

    Less only where there are no more directions.
    """
    ranks = dict.fromkeys(shares, 1)
    rest = sorted(
        ((float(share), name) for name, column in shares.items() for share in column[1:]),
        key=lambda pair: (-pair[0], pair[1]),
    )
    for _, name in rest[: (mean_rank - 1) * len(ranks)]:
        ranks[name] += 1
    return ranks
