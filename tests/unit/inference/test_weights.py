"""What a PEFT folder means, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.common.errors import LorafleetError
from services.inference.adapters.targets import LoraTargets
from services.inference.adapters.weights import adapter_size_bytes, read_adapter
from tests.support.models import make_peft_adapter, make_tiny_llama

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
TARGETS = LoraTargets(
    {
        f"model.layers.{layer}.self_attn.{name}": (64, out)
        for layer in range(2)
        for name, out in (("q_proj", 64), ("v_proj", 32))
    },
    {"lm_head": (64, 264)},
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


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
    base: Path, tmp_path: Path, settings: dict[str, Any], q_rank: int, q_scale: float, v_scale: float
) -> None:
    folder = make_peft_adapter(base, tmp_path / "a", **settings)
    stored = load_file(folder / "adapter_model.safetensors")
    weights = read_adapter(folder, TARGETS, torch.float32)
    assert weights.pairs.keys() == TARGETS.shapes.keys()
    assert weights.pairs[Q].rank == q_rank
    for module, scale in ((Q, q_scale), (V, v_scale)):
        torch.testing.assert_close(
            weights.pairs[module].a, stored[f"base_model.model.{module}.lora_A.weight"]
        )
        expected = stored[f"base_model.model.{module}.lora_B.weight"] * scale
        torch.testing.assert_close(weights.pairs[module].b, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_size_is_known_before_it_is_read(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_peft_adapter(base, tmp_path / "a", r=8, rank_pattern={"q_proj": 2})
    assert read_adapter(folder, TARGETS, dtype).size_bytes == adapter_size_bytes(folder, dtype)


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
    base: Path, tmp_path: Path, how: str
) -> None:
    folder = make_peft_adapter(base, tmp_path / "a")
    read_adapter(folder, TARGETS, torch.float32)
    broken(folder, how)
    with pytest.raises(LorafleetError):
        read_adapter(folder, TARGETS, torch.float32)


@pytest.mark.parametrize(
    ("kind", "config_change", "part", "length"),
    [
        ("lora+bias", {"lora_bias": True}, "lora_B.bias", None),
        ("lora+bias", {"bias": "all"}, "base_layer.bias", None),
        ("lora+scale", {"use_dora": True}, "lora_magnitude_vector", None),
        ("head", {"modules_to_save": ["lm_head"]}, "lm_head.weight", 264),
    ],
)
def test_a_kind_that_is_not_served_is_refused_by_name(
    base: Path, tmp_path: Path, kind: str, config_change: dict[str, Any], part: str, length: int | None
) -> None:
    folder = make_peft_adapter(base, tmp_path / "a")
    path, config_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(path)
    if length is None:
        for name, tensor in list(tensors.items()):
            if name.endswith("lora_B.weight"):
                tensors[name.removesuffix("lora_B.weight") + part] = torch.ones(tensor.shape[0])
    else:
        tensors[f"base_model.model.{part}"] = torch.ones(length, 64)
    save_file(tensors, path)
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | config_change))
    with pytest.raises(LorafleetError) as caught:
        read_adapter(folder, TARGETS, torch.float32)
    assert caught.value.reason == "unsupported_adapter_kind"
    assert caught.value.value == repr(kind)


def test_a_layer_outside_the_decoder_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    folder = make_peft_adapter(base, tmp_path / "a", targets=("q_proj", "lm_head"))
    with pytest.raises(LorafleetError) as caught:
        read_adapter(folder, TARGETS, torch.float32)
    assert caught.value.reason == "adapter_module_unsupported"
    assert caught.value.value == "'lm_head'"
