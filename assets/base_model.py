"""The bundled base model's shape, and writing it as a transformers folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from assets.tokenizer import MAX_TOKENS, SPECIAL_TOKENS, VOCAB_SIZE

END_OF_TEXT_ID = SPECIAL_TOKENS.index("<|endoftext|>")
PAD_ID = SPECIAL_TOKENS.index("<|pad|>")


def base_config() -> LlamaConfig:
    """Returns the configuration: 6 layers, width 256, 8 heads over 4 key-value heads, 5.2 million weights."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PAD_ID,
        use_cache=True,
    )


def new_base(seed: int) -> LlamaForCausalLM:
    """Returns a fresh float32 model with seeded weights; outputs of the residual branches begin at zero."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(base_config())
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def export_base(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes config, generation config and bfloat16 weights; the weights appear whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, folder / "model.safetensors")
    config = model.config.to_dict()
    config.update(architectures=["LlamaForCausalLM"], dtype="bfloat16")
    _write_json(folder / "config.json", config)
    generation = {
        "do_sample": False,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": PAD_ID,
        "transformers_version": config["transformers_version"],
    }
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: Path, value: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)
