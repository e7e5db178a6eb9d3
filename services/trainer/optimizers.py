"""Which optimizers a device can run, told before a job is queued."""

from __future__ import annotations

from services.common.errors import InvalidArgument
from services.trainer.spec import Optimizer

# Pages are CUDA's unified memory; without it bitsandbytes would keep the moments in place and only warn.
NEEDS_CUDA = frozenset({Optimizer.PAGED_ADAMW, Optimizer.PAGED_ADAMW_8BIT})


def check_optimizer(optimizer: Optimizer, device_type: str) -> None:
    """Raise `InvalidArgument` (`unsupported_optimizer`) where the device cannot run `optimizer`."""
    if optimizer in NEEDS_CUDA and device_type != "cuda":
        offered = ", ".join(each.value for each in Optimizer if each not in NEEDS_CUDA)
        raise InvalidArgument(
            "unsupported_optimizer",
            f"optimizer {optimizer.value!r} needs CUDA, and this trainer runs on {device_type}; choose one of"
            f" {offered}",
            field="spec.optimizer",
            value=optimizer.value,
            limit=offered,
        )
