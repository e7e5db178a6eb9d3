"""What a PEFT folder means, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from services.common.errors import LorafleetError
from services.inference.adapters.reader import adapter_size_bytes, read_adapter
from services.inference.adapters.targets import LoraTargets
from services.inference.model.linear import install_lora
from tests.support.architectures import write_tiny_model
from tests.support.models import ALL_LINEAR_TARGETS, make_peft_adapter, make_tiny_llama

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def biased_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("biased")
    return write_tiny_model(path, "llama", attention_bias=True, tie_word_embeddings=True)


def targets_of(base: Path) -> LoraTargets:
    return install_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))[1]


@pytest.fixture(scope="module")
def targets(base: Path) -> LoraTargets:
    return targets_of(base)


@pytest.mark.parametrize(
    ("settings", "q_rank", "q_scale", "v_scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 4, 2.0, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4, 4.0, 4.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}}, 2, 4.0, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"layers.1.self_attn.v_proj": 2}}, 4, 2.0, 0.5),
    ],
)
def test_the_scale_is_folded_into_b(
    base: Path,
    targets: LoraTargets,
    tmp_path: Path,
    settings: dict[str, Any],
    q_rank: int,
    q_scale: float,
    v_scale: float,
) -> None:
    folder = make_peft_adapter(base, tmp_path / "a", **settings)
    stored = load_file(folder / "adapter_model.safetensors")
    weights = read_adapter(folder, targets, torch.float32)
    assert weights.pairs.keys() == {name for name in targets.shapes if name.endswith(("q_proj", "v_proj"))}
    assert weights.pairs[Q].rank == q_rank
    for module, scale in ((Q, q_scale), (V, v_scale)):
        torch.testing.assert_close(
            weights.pairs[module].a, stored[f"base_model.model.{module}.lora_A.weight"]
        )
        expected = stored[f"base_model.model.{module}.lora_B.weight"] * scale
        torch.testing.assert_close(weights.pairs[module].b, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8, "rank_pattern": {"q_proj": 2}},
        {"lora_bias": True, "bias": "lora_only"},
        {"use_dora": True, "targets": (*ALL_LINEAR_TARGETS, "lm_head")},
        {"targets": ("q_proj", "embed_tokens", "lm_head")},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "bias", "scale", "ends", "head"],
)
def test_its_size_is_known_before_it_is_read(
    biased_base: Path, tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    targets = targets_of(biased_base)
    folder = make_peft_adapter(biased_base, tmp_path / "a", **settings)
    weights = read_adapter(folder, targets, dtype)
    assert weights.size_bytes == adapter_size_bytes(folder, targets, dtype)
    assert weights.size_bytes == sum(tensor.nbytes for tensor in weights.tensors)


def broken(folder: Path, how: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    q_a = f"base_model.model.{Q}.lora_A.weight"
    config_path = folder / "adapter_config.json"
    config = json.loads(config_path.read_text())
    match how:
        case "unknown tensor":
            tensors["base_model.model.surprise"] = torch.ones(2)
        case "missing pair":
            del tensors[q_a]
        case "wrong shape":
            tensors[q_a] = torch.ones(8, 65)
        case "wrong rank":
            config["r"] = 16
        case "unknown module":
            tensors = {name.replace("layers.0", "layers.7"): tensor for name, tensor in tensors.items()}
        case "dora":
            config["use_dora"] = True
        case "unknown key":
            config["new_feature"] = 3
        case "not finite":
            tensors[q_a][0, 0] = torch.nan
        case "truncated":
            path.write_bytes(path.read_bytes()[:-10])
            return
        case _:
            raise AssertionError(how)
    save_file(tensors, path)
    config_path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "how",
    [
        "unknown tensor",
        "missing pair",
        "wrong shape",
        "wrong rank",
        "unknown module",
        "dora",
        "unknown key",
        "not finite",
        "truncated",
    ],
)
def test_a_folder_that_would_not_be_served_as_written_is_refused(
    base: Path, targets: LoraTargets, tmp_path: Path, how: str
) -> None:
    folder = make_peft_adapter(base, tmp_path / "a")
    read_adapter(folder, targets, torch.float32)
    broken(folder, how)
    with pytest.raises(LorafleetError):
        read_adapter(folder, targets, torch.float32)


def test_the_norm_of_dora_is_that_of_the_adapted_weight(biased_base: Path, tmp_path: Path) -> None:
    targets = targets_of(biased_base)
    folder = make_peft_adapter(biased_base, tmp_path / "a", r=4, lora_alpha=12, use_dora=True)
    stored = load_file(folder / "adapter_model.safetensors")
    pair = read_adapter(folder, targets, torch.float32).pairs[Q]
    stem = f"base_model.model.{Q}"
    a, b = stored[f"{stem}.lora_A.weight"], stored[f"{stem}.lora_B.weight"]
    adapted = targets.values.weight(Q) + 3.0 * b @ a
    gain = stored[f"{stem}.lora_magnitude_vector"] / adapted.pow(2).sum(1).sqrt()
    bias = targets.values.bias(Q)
    assert bias is not None
    assert pair.gain is not None
    assert pair.shift is not None
    torch.testing.assert_close(pair.gain, gain)
    torch.testing.assert_close(pair.b, gain[:, None] * 3.0 * b)
    torch.testing.assert_close(pair.shift, (1 - gain) * bias)


def changed(folder: Path, change: dict[str, Any], added: dict[str, torch.Tensor]) -> None:
    """Change the config of the adapter in `folder` and add tensors to its file."""
    path, config_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(load_file(path) | added, path)
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | change))


PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("change", "added", "reason", "value"),
    [
        (
            {"modules_to_save": ["score"]},
            {f"{PREFIX}score.weight": torch.ones(3, 64)},
            "unsupported_adapter_kind",
            "head",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            {f"{PREFIX}lm_head.weight": torch.ones(263, 64)},
            "base_mismatch",
            (64, 263),
        ),
        (
            {"modules_to_save": ["lm_head"]},
            {f"{PREFIX}lm_head.weight": torch.ones(264, 64), f"{PREFIX}lm_head.bias": torch.ones(264)},
            "base_mismatch",
            "lm_head",
        ),
        (
            {"bias": "lora_only"},
            {f"{PREFIX}{Q}.base_layer.bias": torch.ones(64)},
            "base_mismatch",
            f"{PREFIX}{Q}.base_layer.bias",
        ),
        (
            {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
            {
                f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(8, 265),
                f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.ones(64, 8),
            },
            "base_mismatch",
            (265, 64),
        ),
    ],
    ids=["classifier", "vocabulary", "head bias", "no bias", "embedding"],
)
def test_what_does_not_fit_the_base_is_refused_by_name(
    base: Path,
    targets: LoraTargets,
    tmp_path: Path,
    change: dict[str, Any],
    added: dict[str, torch.Tensor],
    reason: str,
    value: object,
) -> None:
    folder = make_peft_adapter(base, tmp_path / "a")
    changed(folder, change, added)
    with pytest.raises(LorafleetError) as caught:
        read_adapter(folder, targets, torch.float32)
    assert (caught.value.reason, caught.value.value) == (reason, repr(value))


@pytest.mark.parametrize("module", ["mlp.experts", "mlp.experts.0.gate_proj"])
def test_an_adapter_of_experts_is_refused_by_name(tmp_path: Path, module: str) -> None:
    base = write_tiny_model(
        tmp_path / "base", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    folder = make_peft_adapter(base, tmp_path / "a")
    name = f"model.layers.0.{module}"
    added = {
        f"{PREFIX}{name}.lora_A.weight": torch.ones(8, 64),
        f"{PREFIX}{name}.lora_B.weight": torch.ones(32, 8),
    }
    changed(folder, {"target_modules": ["q_proj", "v_proj", name]}, added)
    with pytest.raises(LorafleetError) as caught:
        read_adapter(folder, targets_of(base), torch.float32)
    assert (caught.value.reason, caught.value.value) == ("adapter_module_unsupported", repr(name))
