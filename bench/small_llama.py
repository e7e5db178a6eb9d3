"""A 120M-parameter Llama with random weights and its adapters, made by script, for measurements of speed.

12 layers, hidden size 768, 12 heads, 4 KV heads, intermediate size 2048, vocabulary 32,000, untied, float32.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 32_000
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
END_TOKEN = "<|end|>"  # noqa: S105 - no password


def make_base(path: Path, *, seed: int = 0) -> Path:
    """Write the model and a byte-level tokenizer of the same vocabulary to `path`, and return `path`."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows every id there is: an end token, the bytes and pairs of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = itertools.islice(itertools.product(alphabet, alphabet), VOCAB_SIZE - 1 - len(alphabet))
    merges = list(pairs)
    words = [END_TOKEN, *alphabet, *("".join(pair) for pair in merges)]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_TOKEN])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_TOKEN, eos_token=END_TOKEN)


def make_adapter(base: Path, path: Path, *, rank: int, seed: int, targets: tuple[str, ...] = TARGETS) -> Path:
    """Write a random adapter for the base in PEFT's layout to `path`, and return `path`."""
    shapes = module_shapes(base, targets)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (in_features, out_features) in shapes.items():
        for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            key = f"base_model.model.{name}.lora_{side}.weight"
            tensors[key] = torch.randn(shape, generator=generator) * 0.02
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def module_shapes(base: Path, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Return name to (in, out) of every targeted linear layer."""
    config = LlamaConfig.from_pretrained(base)
    hidden, middle = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * hidden // config.num_attention_heads
    of = {
        "q_proj": ("self_attn", (hidden, hidden)),
        "k_proj": ("self_attn", (hidden, keys)),
        "v_proj": ("self_attn", (hidden, keys)),
        "o_proj": ("self_attn", (hidden, hidden)),
        "gate_proj": ("mlp", (hidden, middle)),
        "up_proj": ("mlp", (hidden, middle)),
        "down_proj": ("mlp", (middle, hidden)),
    }
    return {
        f"model.layers.{layer}.{of[target][0]}.{target}": of[target][1]
        for layer in range(config.num_hidden_layers)
        for target in targets
    }


def make_prompts(rows: int, tokens: int, *, seed: int = 0) -> list[list[int]]:
    """Return `rows` random prompts of `tokens` ids each, none of them the end token."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = torch.randint(1, VOCAB_SIZE, (rows, tokens), generator=generator).tolist()
    return prompts
