"""Checkpoints of the pretraining run: weights, optimiser moments and counters in one safetensors file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim import Optimizer


@dataclass(slots=True)
class RunCounters:
    """Where a run is: steps and tokens done, seconds spent, and the readers' cursors per stream."""

    step: int
    tokens: int
    elapsed_seconds: float
    cursors: dict[str, int]


def save_state(
    path: Path, model: torch.nn.Module, optimizers: dict[str, Optimizer], counters: RunCounters
) -> None:
    """Writes the whole state of a run; the file appears whole or not at all."""
    tensors = {f"model/{name}": tensor.detach().cpu() for name, tensor in model.named_parameters()}
    for label, optimizer in optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            tensors.update(
                {f"{label}/{index}/{slot}": value.cpu().contiguous() for slot, value in slots.items()}
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"counters": json.dumps(asdict(counters))})
    os.replace(partial, path)


def load_state(path: Path, model: torch.nn.Module, optimizers: dict[str, Optimizer]) -> RunCounters:
    """Restores what `save_state` wrote into the model and the optimisers, and returns the counters."""
    moments: dict[str, dict[int, dict[str, torch.Tensor]]] = {label: {} for label in optimizers}
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file:
        counters = RunCounters(**json.loads(file.metadata()["counters"]))
        keys: list[str] = file.keys()
        for key in keys:
            label, _, rest = key.partition("/")
            if label == "model":
                parameters[rest].data.copy_(file.get_tensor(key))
            else:
                index, _, slot = rest.partition("/")
                moments[label].setdefault(int(index), {})[slot] = file.get_tensor(key)
    for label, optimizer in optimizers.items():
        state = optimizer.state_dict()
        state["state"] = moments[label]
        optimizer.load_state_dict(state)
    return counters
