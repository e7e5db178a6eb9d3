"""Loading the base model: a local transformers folder, in full precision or as bitsandbytes NF4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from services.common.errors import FailedPrecondition
from services.inference.adapters.targets import LoraTargets
from services.inference.model.attention import ATTENTION_NAME
from services.inference.model.linear import StepBinding, install_lora

Quantization = Literal["nf4", "none"]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The loaded base: the model with its seams in place, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    binding: StepBinding
    targets: LoraTargets
    dtype: torch.dtype
    device: torch.device

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a sequence: those of the generation config, or the tokenizer's."""
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        if configured is None:
            configured = self.tokenizer.eos_token_id
        if configured is None:
            return frozenset()
        return frozenset([configured] if isinstance(configured, int) else configured)

    @property
    def vocab_size(self) -> int:
        """Number of logits, which may exceed the number of tokens the tokenizer knows."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        """The longest context the base was made for, in tokens."""
        return int(self.model.config.get_text_config().max_position_embeddings)


def load_base(
    path: Path, *, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> BaseModel:
    """Load the transformers folder `path` for serving.

    Args:
        quantization: `nf4` quantises the linear layers at load, with double quantisation; `dtype` is then the
            compute dtype. The output head stays in `dtype`.

    Raises:
        FailedPrecondition: `base_missing`, or `tokenizer_not_fast` for a tokenizer without a
        tokenizer.json.
    """
    if not (path / "config.json").is_file():
        raise FailedPrecondition("base_missing", f"There is no base model at {path}.", field="base_path")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise FailedPrecondition(
            "tokenizer_not_fast", "The base model has no tokenizer.json.", field="base_path", value=str(path)
        )
    model = AutoModelForCausalLM.from_pretrained(
        path,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=dtype,
        attn_implementation=ATTENTION_NAME,
        quantization_config=_nf4_config(dtype) if quantization == "nf4" else None,
        device_map={"": device},
    )
    model.eval()
    if quantization == "nf4":
        _keep_exact_nf4(model)
    binding, targets = install_lora(model)
    return BaseModel(model, tokenizer, binding, targets, dtype, device)


def _nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _keep_exact_nf4(model: nn.Module) -> None:
    """Switch off the bfloat16 repacking that bitsandbytes does in eval mode on AVX512-BF16 processors.

    It rounds the block scales and the activations to bfloat16, so the values served would no longer be those
    that the adapter was trained on, nor the same on every machine.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
