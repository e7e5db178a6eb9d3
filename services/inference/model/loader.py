"""The base model as the engine uses it: loaded, with its seams in place, and its tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from services.common.base_loading import load_base_model, torch_dtype
from services.common.errors import FailedPrecondition
from services.common.fingerprint import Quantization
from services.inference.adapters.targets import LoraTargets
from services.inference.kernels.attention import KernelAttention
from services.inference.kernels.library import Kernels
from services.inference.model.attention import ATTENTION_NAME, DecodeKernel
from services.inference.model.decoder import install_decoder
from services.inference.model.kernel_linear import install_kernels, kernels_serve
from services.inference.model.linear import StepBinding, install_lora

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The loaded base: the model with its seams in place, and its tokenizer.

    Attributes:
        attention: the kernel of decoding sequences, where there is one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    binding: StepBinding
    targets: LoraTargets
    dtype: torch.dtype
    device: torch.device
    attention: DecodeKernel | None = None

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
    path: Path, quantization: Quantization, device: torch.device, kernels: Kernels | None = None
) -> BaseModel:
    """Load the transformers folder `path` for serving, with our attention and linear seams in place.

    With `kernels` they do what they can; the torch forms do the rest.

    Raises:
        FailedPrecondition: `base_missing`, or `tokenizer_not_fast` for a tokenizer without a tokenizer.json.
    """
    model = load_base_model(path, quantization, device=device, attention=ATTENTION_NAME)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise FailedPrecondition(
            "tokenizer_not_fast", "The base model has no tokenizer.json.", field="base_path", value=str(path)
        )
    binding, targets = install_lora(model)
    dtype = torch_dtype(quantization)
    attention = None
    if kernels is not None and kernels_serve(dtype, device):
        linear = install_kernels(model, binding, kernels)
        fused = install_decoder(model, linear, kernels)
        logger.info("compiled kernels serve the base; %d decoder layers decode in one call each", fused)
        attention = KernelAttention(kernels)
    return BaseModel(model, tokenizer, binding, targets, dtype, device, attention)
