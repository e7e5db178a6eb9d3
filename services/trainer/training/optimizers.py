"""AdamW in the forms that a specification can name."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch

from services.trainer.spec import Optimizer, TrainingSpec
from services.trainer.training.adapter import TrainableAdapter

# The key under which a parameter group keeps its share of the learning rate.
RATE_FACTOR = "rate_factor"
_BITSANDBYTES = {
    Optimizer.ADAMW_8BIT: bnb.optim.AdamW8bit,
    Optimizer.PAGED_ADAMW: bnb.optim.PagedAdamW32bit,
    Optimizer.PAGED_ADAMW_8BIT: bnb.optim.PagedAdamW8bit,
}


def new_optimizer(adapter: TrainableAdapter, spec: TrainingSpec) -> torch.optim.Optimizer:
    """Return the optimizer of a run.

    With LoRA+ every B learns at `spec.lora_plus_ratio` times the rate of the rest (Hayou et al. 2024, arXiv
    2402.12354,
    equation 5).
    """
    groups = _groups(adapter, spec.lora_plus_ratio)
    options: dict[str, Any] = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay}
    if spec.optimizer is Optimizer.ADAMW:
        return torch.optim.AdamW(groups, fused=True, **options)
    optimizer: torch.optim.Optimizer = _BITSANDBYTES[spec.optimizer](groups, **options)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATE_FACTOR]


def state_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return what the optimizer knows of each parameter, as `NAME/KEY`; numbers become tensors."""
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().to("cpu").clone().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Take over what `state_tensors` gave."""
    counts_in_tensors = isinstance(optimizer, torch.optim.AdamW)
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        is_count = key == "step" and not counts_in_tensors
        optimizer.state[parameter][key] = int(value) if is_count else value.to(parameter.device)


def _groups(adapter: TrainableAdapter, ratio: float) -> list[dict[str, Any]]:
    parameters = adapter.parameters()
    if ratio == 1.0:
        return [{"params": list(parameters.values()), RATE_FACTOR: 1.0}]
    fast = [parameter for name, parameter in parameters.items() if name.endswith(".b")]
    slow = [parameter for name, parameter in parameters.items() if not name.endswith(".b")]
    return [{"params": slow, RATE_FACTOR: 1.0}, {"params": fast, RATE_FACTOR: ratio}]
