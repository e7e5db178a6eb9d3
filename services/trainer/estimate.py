"""What a job will take, told before it starts."""

from __future__ import annotations

from collections.abc import Mapping

from services.common.fingerprint import Quantization, QuantizationType
from services.trainer.bases import TrainableBase
from services.trainer.job import DatasetReport, Estimate
from services.trainer.spec import TrainingSpec

_FLOAT32_BYTES = 4
# 4-bit values, an 8-bit scale per block of 64, and a 32-bit scale of the scales per 256 blocks.
_NF4_BITS_PER_WEIGHT = 4 + 8 / 64 + 32 / (64 * 256)
# Tensors of the hidden width that a decoder layer keeps for the backward pass: norms, projections, residuals.
_KEPT_PER_LAYER = 16


def estimate(spec: TrainingSpec, report: DatasetReport, base: TrainableBase) -> Estimate:
    """Return tokens, steps and bytes of a run; its minutes are 0 until steps were measured.

    The bytes are calculated, not measured: activations are those of a batch of the longest row.
    """
    steps_per_epoch = -(-report.rows // spec.rows_per_step)
    adapter_weights = spec.rank * sum(
        sum(size) for name, size in base.modules.items() if name.rpartition(".")[2] in spec.target_modules
    )
    row_tokens = min(report.max_row_tokens, spec.max_seq_len)
    batch_tokens = spec.batch_size * row_tokens
    kept = 1 if spec.gradient_checkpointing else _KEPT_PER_LAYER
    activations = batch_tokens * base.record.hidden_size * base.record.num_layers * kept * _FLOAT32_BYTES
    logits = 2 * batch_tokens * base.record.vocab_size * _FLOAT32_BYTES
    return Estimate(
        tokens=report.tokens * spec.n_epochs,
        steps=steps_per_epoch * spec.n_epochs,
        minutes=0.0,
        memory_bytes={
            "base": base_bytes(base.record.num_parameters, base.modules, base.fingerprint.quantization),
            "adapter": adapter_weights * _FLOAT32_BYTES,
            # AdamW keeps two moments, and the gradient is as large as the weights.
            "optimizer": 3 * adapter_weights * _FLOAT32_BYTES,
            "activations": activations + logits,
        },
    )


def base_bytes(
    num_parameters: int, modules: Mapping[str, tuple[int, int]], quantization: Quantization
) -> int:
    """Return the bytes of the base's weights on the device."""
    dtype_bytes = 4 if quantization.compute_dtype.value == "float32" else 2
    if quantization.type is QuantizationType.NONE:
        return num_parameters * dtype_bytes
    linear = sum(columns * rows for columns, rows in modules.values())
    return int(linear * _NF4_BITS_PER_WEIGHT / 8) + (num_parameters - linear) * dtype_bytes
