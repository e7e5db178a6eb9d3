"""What a run needs to go on: weights, optimizer moments, step and figures. Safetensors and JSON only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from services.trainer.checkpoint_store import BEST, OPTIMIZER, STATE, WEIGHTS, corrupt_checkpoint
from services.trainer.figures import StepFigures
from services.trainer.training.adapter import TrainableAdapter
from services.trainer.training.optimizers import load_state_tensors, state_tensors


@dataclass(slots=True)
class RunState:
    """Where a run stands between two steps. Order, dropout and learning rate follow from seed and step.

    Attributes:
        bad_steps: steps in a row, up to now, whose loss or gradient was not finite.
        train_seconds: time spent in steps, over all attempts.
        best_valid_loss: the lowest validation loss, where early stopping looks for it.
        stale_validations: validations since then.
        is_stopped: whether early stopping has ended the run.
    """

    step: int = 0
    trained_tokens: int = 0
    bad_steps: int = 0
    train_seconds: float = 0.0
    best_valid_loss: float | None = None
    stale_validations: int = 0
    is_stopped: bool = False
    figures: list[StepFigures] = field(default_factory=list)


def write_run(
    folder: Path,
    adapter: TrainableAdapter,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    best: dict[str, torch.Tensor] | None,
) -> None:
    """Write the files of a checkpoint to the empty folder `folder`; `best`: weights of the lowest loss."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = adapter.parameters()
    save_file(_on_cpu(parameters | adapter.constants()), folder / WEIGHTS)
    save_file(state_tensors(optimizer, parameters), folder / OPTIMIZER)
    if best is not None:
        save_file(_on_cpu(best), folder / BEST)
    (folder / STATE).write_text(json.dumps(asdict(state), allow_nan=False), encoding="ascii")


def read_run(
    folder: Path, adapter: TrainableAdapter, optimizer: torch.optim.Optimizer
) -> tuple[RunState, dict[str, torch.Tensor] | None]:
    """Load the files of a checkpoint into adapter and optimizer; return the run's state and its best weights.

    Raises:
        DataLoss: `corrupt_checkpoint`, where the tensors are not those of this adapter.
    """
    read_weights(folder, adapter)
    load_state_tensors(optimizer, adapter.parameters(), load_file(folder / OPTIMIZER))
    raw: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="ascii"))
    figures = [StepFigures(**row) for row in raw.pop("figures")]
    best = load_file(folder / BEST) if (folder / BEST).exists() else None
    return RunState(**raw, figures=figures), best


def read_weights(folder: Path, adapter: TrainableAdapter) -> None:
    """Load the weights of a checkpoint into `adapter`, as to publish them; raise as `read_run` does."""
    weights = load_file(folder / WEIGHTS)
    parameters = adapter.parameters()
    if set(weights) != set(parameters) | set(adapter.constants()):
        raise corrupt_checkpoint(folder.name, "its tensors are those of another adapter")
    load_weights(parameters, weights)
    adapter.load_constants(weights)


@torch.no_grad()
def load_weights(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    """Give the parameters the values in `weights`; with EVA a layer's rank may differ between machines."""
    for name, parameter in parameters.items():
        parameter.data = weights[name].to(parameter.device, copy=True)


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
