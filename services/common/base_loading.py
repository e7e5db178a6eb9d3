"""Loading the base: one way for trainer and inference, so that both hold the same values."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from services.common.errors import FailedPrecondition
from services.common.fingerprint import Quantization, QuantizationType


def load_base_model(
    path: Path, quantization: Quantization, *, device: torch.device, attention: str
) -> PreTrainedModel:
    """Return the transformers folder `path` as a frozen causal language model in evaluation mode.

    Linear weights are made 4-bit at load (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3);
    embeddings, norms and the output head stay in the compute type.

    Args:
        attention: the name of a registered attention implementation.

    Raises:
        FailedPrecondition: `base_missing`.
    """
    if not (path / "config.json").is_file():
        raise FailedPrecondition("base_missing", f"There is no base model at {path}.", field="base_path")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch_dtype(quantization),
        attn_implementation=attention,
        quantization_config=_four_bit(quantization),
        device_map={"": device},
    )
    _keep_exact_values(model)
    model.requires_grad_(False)
    return model.eval()


def torch_dtype(quantization: Quantization) -> torch.dtype:
    """Return the compute type as torch names it."""
    dtype = getattr(torch, quantization.compute_dtype.value)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _four_bit(quantization: Quantization) -> BitsAndBytesConfig | None:
    if quantization.type is QuantizationType.NONE:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type.value,
        bnb_4bit_use_double_quant=quantization.double_quantization,
        bnb_4bit_compute_dtype=torch_dtype(quantization),
    )


def _keep_exact_values(model: nn.Module) -> None:
    """Switch off the bfloat16 repacking that bitsandbytes does in eval mode on AVX512-BF16 processors.

    It rounds the block scales and the activations to bfloat16, so the values served would not be those that
    the adapter was trained on, nor the same on every machine; and no training goes on after it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
