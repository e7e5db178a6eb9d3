"""What a job will take, told before it starts, and the refusal of what cannot fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.common.errors import ResourceExhausted
from services.common.fingerprint import Quantization, QuantizationType
from services.trainer.bases import TrainableBase
from services.trainer.job import DatasetReport, Estimate
from services.trainer.spec import LossScope, Optimizer, TrainingSpec

_FLOAT32_BYTES = 4
# 4-bit values, an 8-bit scale per block of 64, and a 32-bit scale of the scales per 256 blocks.
_NF4_BITS_PER_WEIGHT = 4 + 8 / 64 + 32 / (64 * 256)
# Two moments; in 8 bits each, with a 32-bit scale per block of 256.
_MOMENT_BYTES = {
    Optimizer.ADAMW: 8.0,
    Optimizer.PAGED_ADAMW: 8.0,
    Optimizer.ADAMW_8BIT: 2 + 2 * 4 / 256,
    Optimizer.PAGED_ADAMW_8BIT: 2 + 2 * 4 / 256,
}
# Tensors of the hidden width that a decoder layer keeps beside what its linear layers take in and give out.
_KEPT_BESIDE_LINEAR = 4
# Logits in float32, their gradient, and the log-probabilities between them.
_LOGIT_COPIES = 3
# A process with torch and transformers, before it holds a model.
_RUNTIME_BYTES = 450 * 1024 * 1024
# Speeds to begin with, until a job has told better: of one CPU core, and of one GPU.
_ASSUMED_CORE_FLOPS = 1e10
_ASSUMED_GPU_FLOPS = 1e14
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class DataSize:
    """How much data a job trains on.

    Attributes:
        rows: rows of one epoch.
        tokens: their tokens.
        supervised_tokens: those of them that count in the loss.
        max_row_tokens: longest row.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    max_row_tokens: int

    @classmethod
    def of(cls, report: DatasetReport) -> DataSize:
        """Return the size that a report states."""
        return cls(report.rows, report.tokens, report.supervised_tokens, report.max_row_tokens)


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast jobs train here, and what that is taken from."""

    tokens_per_second: float
    basis: str

    @classmethod
    def assumed(cls, base: TrainableBase, spec: TrainingSpec, *, device_type: str, cores: int) -> Pace:
        """Return a pace by arithmetic: 4 FLOP per parameter and token, 6 with gradient checkpointing.

        2 go into the forward pass and 2 into the gradients of the activations; the frozen base has no others.
        """
        flops = _ASSUMED_GPU_FLOPS if device_type == "cuda" else _ASSUMED_CORE_FLOPS * cores
        per_token = (6 if spec.gradient_checkpointing else 4) * max(1, base.record.num_parameters)
        return cls(flops / per_token, "assumed")


def estimate(
    spec: TrainingSpec, size: DataSize, base: TrainableBase, *, pace: Pace, limit_bytes: int
) -> Estimate:
    """Return tokens, steps, minutes and bytes of a run: calculated, for a batch of the longest rows."""
    steps_per_epoch = -(-size.rows // spec.rows_per_step)
    if spec.packing:
        steps_per_epoch = max(1, -(-size.tokens // (spec.rows_per_step * spec.max_seq_len)))
    tokens = size.tokens * spec.n_epochs
    trained = tokens if not spec.token_budget else min(tokens, spec.token_budget)
    minutes = trained / pace.tokens_per_second / 60
    return Estimate(
        tokens=tokens,
        steps=steps_per_epoch * spec.n_epochs,
        minutes=minutes if not spec.minutes_budget else min(minutes, spec.minutes_budget),
        memory_bytes=_memory_bytes(spec, size, base),
        limit_bytes=limit_bytes,
        minutes_basis=pace.basis,
    )


def require_fit(estimate: Estimate) -> None:
    """Refuse a job that needs more memory than it may use.

    Raises:
        ResourceExhausted: `job_too_large`, with the bytes of each part.
    """
    if estimate.total_bytes <= estimate.limit_bytes:
        return
    parts = " + ".join(f"{name} {_in_mib(size)}" for name, size in estimate.memory_bytes.items())
    raise ResourceExhausted(
        "job_too_large",
        f"the job needs about {_in_mib(estimate.total_bytes)} MiB ({parts}) and may use"
        f" {_in_mib(estimate.limit_bytes)} MiB; lower batch_size, max_seq_len or rank, or set"
        " gradient_checkpointing",
        field="spec",
        value=estimate.total_bytes,
        limit=estimate.limit_bytes,
        metadata={f"{name}_bytes": str(size) for name, size in estimate.memory_bytes.items()},
        final=True,
    )


def base_bytes(
    num_parameters: int, modules: Mapping[str, tuple[int, int]], quantization: Quantization
) -> int:
    """Return the bytes of the base's weights on the device."""
    dtype_bytes = _compute_bytes(quantization)
    if quantization.type is QuantizationType.NONE:
        return num_parameters * dtype_bytes
    linear = sum(columns * rows for columns, rows in modules.values())
    return int(linear * _NF4_BITS_PER_WEIGHT / 8) + (num_parameters - linear) * dtype_bytes


def _memory_bytes(spec: TrainingSpec, size: DataSize, base: TrainableBase) -> dict[str, int]:
    quantization = base.fingerprint.quantization
    dtype_bytes = _compute_bytes(quantization)
    adapted = [
        shape for name, shape in base.modules.items() if name.rpartition(".")[2] in spec.target_modules
    ]
    adapter_weights = spec.rank * sum(sum(shape) for shape in adapted)
    row_tokens = spec.max_seq_len if spec.packing else min(size.max_row_tokens, spec.max_seq_len)
    batch_tokens = spec.batch_size * row_tokens
    counted = batch_tokens
    if spec.loss_scope is LossScope.COMPLETIONS and size.tokens:
        counted = -(-batch_tokens * size.supervised_tokens // size.tokens)
    largest = max((columns * rows for columns, rows in base.modules.values()), default=0)
    expanded = largest * dtype_bytes if quantization.type is not QuantizationType.NONE else 0
    return {
        "base": base_bytes(base.record.num_parameters, base.modules, quantization),
        "adapter": adapter_weights * _FLOAT32_BYTES,
        "gradients": adapter_weights * _FLOAT32_BYTES,
        "optimizer": int(adapter_weights * _MOMENT_BYTES[spec.optimizer]),
        "activations": _kept_per_token(spec, base) * batch_tokens * dtype_bytes,
        "logits": _LOGIT_COPIES * counted * base.record.vocab_size * _FLOAT32_BYTES,
        # The program itself, and one 4-bit weight at a time in the form that it is multiplied in.
        "runtime": _RUNTIME_BYTES + expanded,
    }


def _kept_per_token(spec: TrainingSpec, base: TrainableBase) -> int:
    """Return how many numbers the backward pass needs of each token."""
    hidden, layers = base.record.hidden_size, max(1, base.record.num_layers)
    whole = sum(sum(shape) for shape in base.modules.values()) + _KEPT_BESIDE_LINEAR * hidden * layers
    # With checkpoints of the layers' inputs, one layer at a time is computed again.
    return hidden * layers + whole // layers if spec.gradient_checkpointing else whole


def _compute_bytes(quantization: Quantization) -> int:
    return 4 if quantization.compute_dtype.value == "float32" else 2


def _in_mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:,.0f}"
