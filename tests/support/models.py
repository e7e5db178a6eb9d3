"""Tiny but complete models and adapters, made on the spot from a seed.

`make_tiny_llama` writes a folder that transformers can load, train and serve: random weights, a byte-level
tokenizer (256 bytes and six special tokens) and a chat template. `make_peft_adapter` writes a PEFT folder for
it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
END_TOKEN = "<|end|>"
SPECIAL_TOKENS = (EOS_TOKEN, PAD_TOKEN, *ROLE_TOKENS, END_TOKEN)

# Each turn is closed by the end-of-sequence token, so the rendering of k messages is a prefix of that of k +
# 1.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|endoftext|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

QV_TARGETS = ("q_proj", "v_proj")
ALL_LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_LOW_RANK_PARTS = ("lora_A", "lora_embedding_A", "lora_embedding_B", "lora_B.default.weight")

# Two ids more than the tokenizer knows, as real models have that round their vocabulary up.
VOCAB_SIZE = 264


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: ids 0-5 are the special tokens, ids 6-261 the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=[*ROLE_TOKENS, END_TOKEN],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_llama(
    path: Path,
    *,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int = 128,
    max_position_embeddings: int = 512,
    sliding_window: int | None = None,
    tie_word_embeddings: bool = False,
    seed: int = 0,
) -> Path:
    """Write a random-weight float32 causal model and its tokenizer to `path`, and return `path`.

    The weights are drawn wide (standard deviation 0.2) so that greedy choices are well separated. With a
    `sliding_window` the architecture is Mistral, otherwise Llama.
    """
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": 0.2,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlamaForCausalLM | MistralForCausalLM
        if sliding_window is None:
            model = LlamaForCausalLM(LlamaConfig(**shape))
        else:
            model = MistralForCausalLM(MistralConfig(**shape, sliding_window=sliding_window))
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def make_peft_adapter(
    base_path: Path,
    out: Path,
    *,
    r: int = 8,
    targets: Sequence[str] | str = QV_TARGETS,
    lora_alpha: int | None = None,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Write a PEFT LoRA folder with random, non-zero A and B for the base at `base_path`; return `out`.

    `settings` go to PEFT's `LoraConfig` as they are; what they make trainable besides A and B (biases,
    magnitudes, whole layers) is moved by a random tenth or so, as training would.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32, local_files_only=True)
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha if lora_alpha is not None else 2 * r,
            target_modules=targets if isinstance(targets, str) else list(targets),
            use_rslora=use_rslora,
            rank_pattern=dict(rank_pattern or {}),
            alpha_pattern=dict(alpha_pattern or {}),
            lora_dropout=0.0,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            **settings,
        )
        model = wrap_with_peft(base, config)
        if settings:
            _move_trained_values(model)
        with warnings.catch_warnings():
            # PEFT takes the one-dimensional bias of B for a damaged matrix.
            warnings.filterwarnings("ignore", "Adapter .* invalid shape", PeftWarning)
            model.save_pretrained(out, save_embedding_layers=False)
    return out


@torch.no_grad()
def _move_trained_values(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(part in name for part in _LOW_RANK_PARTS):
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter)).add_(0.1 * torch.randn_like(parameter))


def wrap_with_peft(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Return `base` wrapped by PEFT, without the deprecation that PEFT itself causes in transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed but", PeftWarning)
        model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return model


def load_peft_adapters(base: PreTrainedModel, adapters: Mapping[str, Path]) -> PeftModel:
    """Return `base` wrapped by PEFT, every folder of `adapters` loaded under its name, in inference mode."""
    names = list(adapters)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed but", PeftWarning)
        model = PeftModel.from_pretrained(base, str(adapters[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(adapters[name]), adapter_name=name)
    return model.eval()
