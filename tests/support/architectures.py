"""Tiny random models of every architecture that is served, and the names of their linear layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.models import ALL_LINEAR_TARGETS, QV_TARGETS, VOCAB_SIZE, byte_tokenizer

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Architecture:
    """One architecture: its name in transformers, its settings, and what adapters target there.

    Attributes:
        linears: every kind of linear layer inside the decoder's layers.
        few: what small adapters target: queries and values, or the layer that holds them.
        embedding: the name of the input embedding.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    linears: tuple[str, ...] = ALL_LINEAR_TARGETS
    few: tuple[str, ...] = QV_TARGETS
    embedding: str = "embed_tokens"
    has_experts: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama"),
    "llama-biases": Architecture("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Architecture("mistral", {"sliding_window": 7}),
    "qwen2": Architecture("qwen2"),
    "qwen2-sliding": Architecture(
        "qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    ),
    "qwen3": Architecture("qwen3", {"head_dim": 24}),
    "gemma": Architecture("gemma", {"head_dim": 16}),
    "gemma2": Architecture(
        "gemma2",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 12.0,
        },
    ),
    "gemma3": Architecture(
        "gemma3_text",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi": Architecture(
        "phi",
        {"partial_rotary_factor": 0.5},
        linears=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    ),
    "phi3": Architecture(
        "phi3",
        linears=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        few=("qkv_proj",),
    ),
    "gpt_neox": Architecture(
        "gpt_neox",
        {"rotary_pct": 0.5, "num_key_value_heads": None},
        linears=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        few=("query_key_value",),
        embedding="embed_in",
    ),
    "olmo2": Architecture("olmo2"),
    "granite": Architecture(
        "granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
    ),
    "mixtral": Architecture("mixtral", {"num_local_experts": 4}, linears=_ATTENTION, has_experts=True),
    "qwen3_moe": Architecture(
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
        linears=_ATTENTION,
        has_experts=True,
    ),
    "gpt_oss": Architecture(
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        linears=_ATTENTION,
        has_experts=True,
    ),
    "olmoe": Architecture(
        "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, linears=_ATTENTION, has_experts=True
    ),
}


def write_tiny_model(path: Path, model_type: str, **settings: Any) -> Path:
    """Write a random-weight float32 model of two layers and its byte-level tokenizer to `path`; return it.

    The weights are drawn wide, so that greedy choices are well separated, and biases and norms are moved away
    from the zeros and ones that a fresh model has.
    """
    config = AutoConfig.for_model(
        **{
            "model_type": model_type,
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 1,
            **settings,
        }
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path
