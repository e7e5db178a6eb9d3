"""Decoder-only transformers models with ordinary attention are served as transformers runs them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from services.common.errors import FailedPrecondition, Unimplemented
from services.inference.engine.engine import Engine
from tests.support.engines import FolderFetcher, Reference, make_engine, request, run_all, tokens_of
from tests.support.models import (
    ALL_LINEAR_TARGETS,
    VOCAB_SIZE,
    byte_tokenizer,
    make_peft_adapter,
    make_tiny_llama,
)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 16},
    "phi3": {"pad_token_id": 1},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0},
}


def write_model(path: Path, model_type: str, **settings: Any) -> Path:
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def assert_as_transformers(engine: Engine, reference: Reference, adapters: list[str | None]) -> None:
    draw = random.Random(2)
    work = [
        (f"r{i}-{adapter}", [draw.randrange(6, VOCAB_SIZE) for _ in range(length)], adapter)
        for i, length in enumerate((1, 5, 19, 40))
        for adapter in adapters
    ]
    for name, prompt, adapter in work:
        engine.add(request(name, prompt, adapter, max_tokens=12))
    events = run_all(engine)
    for name, prompt, adapter in work:
        assert tokens_of(events[name]) == reference.generate(prompt, adapter, 12), name
    engine.adapters.close()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_served_as_transformers_runs_it(name: str, tmp_path: Path) -> None:
    settings = {"model_type": name, **ARCHITECTURES[name]}
    base = write_model(tmp_path / "base", **settings)
    targets = ("qkv_proj", "down_proj") if name == "phi3" else ("q_proj", "up_proj")
    adapters = {"a": make_peft_adapter(base, tmp_path / "a", r=4, targets=targets)}
    engine = make_engine(
        base, tmp_path / "cache", FolderFetcher(adapters), max_batch_tokens=24, max_num_seqs=16
    )
    assert_as_transformers(engine, Reference(base, adapters), [None, "a"])


@pytest.mark.parametrize("window", [2, 5, 16])
def test_a_sliding_window_in_whole_prompts_chunks_and_decoding(window: int, tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", sliding_window=window)
    adapters = {"a": make_peft_adapter(base, tmp_path / "a", targets=ALL_LINEAR_TARGETS)}
    reference = Reference(base, adapters)
    for number, settings in enumerate(({}, {"max_batch_tokens": 13, "max_num_seqs": 8})):
        engine = make_engine(base, tmp_path / f"cache{number}", FolderFetcher(adapters), **settings)
        assert_as_transformers(engine, reference, [None, "a"])


def test_tied_embeddings_and_grouped_heads(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", heads=8, kv_heads=1, tie_word_embeddings=True)
    adapters = {"a": make_peft_adapter(base, tmp_path / "a")}
    engine = make_engine(base, tmp_path / "cache", FolderFetcher(adapters))
    assert_as_transformers(engine, Reference(base, adapters), [None, "a"])


def test_soft_capped_attention_is_refused_when_the_model_is_loaded(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "gemma2", head_dim=16, attn_logit_softcapping=30.0)
    with pytest.raises(Unimplemented) as caught:
        make_engine(base, tmp_path / "cache", FolderFetcher({}))
    assert caught.value.reason == "attention_feature_unsupported"
    assert "softcap" in caught.value.message


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        make_engine(tmp_path / "nothing", tmp_path / "cache", FolderFetcher({}))
    assert caught.value.reason == "base_missing"
