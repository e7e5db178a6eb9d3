"""What one job trains: an update for each of its layers, with the job's own stream of dropout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from services.trainer.training.forms import LayerForm, Pair
from services.trainer.training.lowrank import Dropout, LowRank, rescale
from services.trainer.training.weights import base_weight

# Passes of one run are further apart than layers of one pass.
_SEEDS_PER_PASS = 1 << 20


class TrainableAdapter:
    """The trained forms of a job's layers.

    Attributes:
        forms: by the layer's name.
        dropout: rate of elements of a layer's input that the update does not see while training.
    """

    def __init__(
        self, forms: Mapping[str, LayerForm], linears: Mapping[str, nn.Linear], *, dropout: float
    ) -> None:
        self.forms = dict(forms)
        self.dropout = dropout
        self._linears = {name: linears[name] for name in forms}
        self._numbers = {name: number for number, name in enumerate(sorted(forms))}
        self._dropout_seed: int | None = None

    def parameters(self) -> dict[str, Parameter]:
        """Return what is trained, by name, in a fixed order."""
        return {
            f"{name}.{part}": parameter
            for name in sorted(self.forms)
            for part, parameter in self.forms[name].parameters.items()
        }

    def constants(self) -> dict[str, Tensor]:
        """Return the tensors that belong to the update and are not trained, by name."""
        return {
            f"{name}.{part}": tensor
            for name in sorted(self.forms)
            for part, tensor in self.forms[name].constants.items()
        }

    def load_constants(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over constants that `constants` gave."""
        for name, form in self.forms.items():
            for part, tensor in form.constants.items():
                form.constants[part] = tensors[f"{name}.{part}"].to(tensor.device)

    def begin_pass(self, seed: int) -> None:
        """Draw the dropout of the next pass, forward and backward, from `seed` (below 2^40)."""
        self._dropout_seed = seed * _SEEDS_PER_PASS

    def end_pass(self) -> None:
        """Leave dropout off until the next pass."""
        self._dropout_seed = None

    def penalty(self) -> Tensor | None:
        """Return what the method adds to the loss of a step, or None."""
        terms = [term for form in self.forms.values() if (term := form.penalty()) is not None]
        return torch.stack(terms).sum() if terms else None

    def updates(self, name: str, start: int, stop: int) -> list[LowRank]:
        """Return what the layer `name` adds to its output for the tokens `start` to `stop`."""
        form = self.forms.get(name)
        if form is None:
            return []
        return [
            LowRank(start, stop, pair.scale, pair.a, pair.b, self._dropout_of(name, pair))
            for pair in form.pairs()
        ]

    def rescale(self, output: Tensor, name: str, start: int, stop: int) -> Tensor:
        """Return `output`, updates added, with the rows of the layer scaled to their trained norms (DoRA)."""
        form = self.forms.get(name)
        if form is None or form.magnitude is None:
            return output
        linear = self._linears[name]
        scale = form.magnitude / row_norms(base_weight(linear), form.pairs())
        return rescale(output, start, stop, scale, linear.bias)

    def _dropout_of(self, name: str, pair: Pair) -> Dropout | None:
        if self._dropout_seed is None or not self.dropout or not pair.is_trained:
            return None
        return Dropout(self.dropout, self._dropout_seed + self._numbers[name])


@torch.no_grad()
def row_norms(weight: Tensor, pairs: list[Pair]) -> Tensor:
    """Return |W + sum of scale B A| of each row, [out_features].

    No gradient passes through it (DoRA, Liu et al. 2024, arXiv 2402.09353, section 4.3).
    """
    total = weight
    for pair in pairs:
        total = torch.addmm(total, pair.b, pair.a, alpha=pair.scale)
    norms: Tensor = torch.linalg.norm(total, dim=1)
    return norms
