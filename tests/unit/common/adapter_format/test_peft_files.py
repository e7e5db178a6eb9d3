"""Files that PEFT itself wrote are read, and give PEFT's own ranks and scalings."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from services.common.adapter_format import (
    AdapterCard,
    AdapterKind,
    AdapterLimits,
    OutputHead,
    export_folder,
    read_folder,
)
from services.common.errors import InvalidArgument
from services.common.fingerprint import linear_module_table
from tests.support.models import (
    ALL_LINEAR_TARGETS,
    load_peft_adapters,
    make_peft_adapter,
    make_tiny_llama,
    wrap_with_peft,
)

RANK_PATTERN = {"q_proj": 2, "layers.1.mlp.down_proj": 3, "^model.layers.0.self_attn.v_proj": 5}
ALPHA_PATTERN = {"layers.0.mlp.up_proj": 7, "o_proj": 9, "layers.1.self_attn.o_proj": 100}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("base"), hidden_size=32, intermediate_size=48)


def peft_scaling(base: Path, adapter: Path) -> dict[str, tuple[int, float]]:
    """Layer -> (rank, scaling) as PEFT has them after loading the folder."""
    model = load_peft_adapters(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True),
        {"default": adapter},
    )
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("rank_pattern", "alpha_pattern"),
    [({}, {}), (RANK_PATTERN, {}), ({}, ALPHA_PATTERN), (RANK_PATTERN, ALPHA_PATTERN)],
)
def test_ranks_and_scales_equal_pefts(
    base: Path,
    tmp_path: Path,
    use_rslora: bool,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, int],
) -> None:
    folder = make_peft_adapter(
        base,
        tmp_path / "adapter",
        r=4,
        targets=ALL_LINEAR_TARGETS,
        lora_alpha=10,
        use_rslora=use_rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
    summary = read_folder(folder, base_modules=linear_module_table(base))
    expected = peft_scaling(base, folder)
    assert {module.name: module.rank for module in summary.modules} == {k: v[0] for k, v in expected.items()}
    for module in summary.modules:
        assert math.isclose(module.scale, expected[module.name][1], rel_tol=1e-12), module.name


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")]
)
def test_summary_of_each_dtype(base: Path, tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
    config = LoraConfig(
        r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    wrap_with_peft(model, config).to(dtype).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    summary = read_folder(tmp_path / "adapter", base_modules=linear_module_table(base))
    assert summary.dtype == name
    assert summary.kind is AdapterKind.LORA
    assert summary.targets == ("q_proj", "up_proj")
    with safe_open(weights, "pt") as file:
        assert summary.num_parameters == sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert summary.weights_bytes == weights.stat().st_size
    assert summary.weights_digest == "sha256:" + hashlib.sha256(weights.read_bytes()).hexdigest()
    assert summary.declared_base == str(base)
    assert summary.warnings == ()


def test_fresh_adapter_is_marked_noop(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrap_with_peft(model, config).save_pretrained(tmp_path / "adapter")
    assert read_folder(tmp_path / "adapter").warnings == ("noop_adapter",)


def biased_llama() -> LlamaForCausalLM:
    """A small model whose attention layers have biases."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, attention_bias=True))


# PEFT takes the one-dimensional bias of B for a damaged matrix.
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (AdapterKind.LORA_BIAS, {"lora_bias": True}),
        (AdapterKind.LORA_BIAS, {"bias": "lora_only"}),
        (AdapterKind.LORA_SCALE, {"use_dora": True}),
        (AdapterKind.HEAD, {"modules_to_save": ["lm_head"]}),
        (AdapterKind.LORA, {"target_modules": "all-linear"}),
        (AdapterKind.LORA, {"target_modules": ["q_proj"], "layers_to_transform": [0]}),
        (AdapterKind.LORA, {"task_type": None}),
    ],
)
def test_kinds_that_peft_writes(tmp_path: Path, kind: AdapterKind, settings: dict[str, object]) -> None:
    config = LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings))
    wrap_with_peft(biased_llama(), config).save_pretrained(tmp_path, save_embedding_layers=False)
    (tmp_path / "README.md").unlink(missing_ok=True)
    summary = read_folder(tmp_path)
    assert summary.kind is kind
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert summary.num_parameters == sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118


def test_classifier_that_peft_writes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=4, num_labels=3))
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    wrap_with_peft(model, config).save_pretrained(tmp_path, save_embedding_layers=False)
    summary = read_folder(tmp_path)
    assert summary.kind is AdapterKind.HEAD
    assert summary.head == OutputHead("score", 32, 3, False)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("reason", "feature", "settings"),
    [
        ("unsupported_feature", "trainable_token_indices", {"trainable_token_indices": [1, 2]}),
        ("unsupported_feature", "init_lora_weights", {"init_lora_weights": "pissa"}),
        ("unsupported_field", "target_modules", {"target_modules": r".*\.q_proj"}),
        ("unsupported_field", "exclude_modules", {"exclude_modules": r".*\.1\..*"}),
    ],
)
def test_peft_features_outside_the_format_are_named(
    base: Path, tmp_path: Path, reason: str, feature: str, settings: dict[str, object]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    config = LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings))
    wrap_with_peft(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(InvalidArgument) as caught:
        read_folder(tmp_path / "adapter")
    assert caught.value.reason == reason
    assert caught.value.field == f"config.{feature}"


def test_export_loads_in_peft_with_the_same_output(base: Path, tmp_path: Path) -> None:
    folder = make_peft_adapter(base, tmp_path / "adapter", r=2)
    summary = read_folder(folder)
    card = AdapterCard("billing", 3, "sha256:00", 'tiny "base"\n# x', "sha256:11", "Sorts letters.", summary)
    out = tmp_path / "out"
    export_folder(folder / "adapter_config.json", folder / "adapter_model.safetensors", out, card)
    assert read_folder(out) == summary
    text = (out / "README.md").read_text()
    assert "# billing, version 3" in text
    assert '\nbase_model: "tiny \\"base\\"\\n# x"\n' in text
    tokens = torch.arange(6, 20)[None]
    outputs = []
    for path in (folder, out):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        with torch.no_grad():
            outputs.append(load_peft_adapters(model, {"default": path})(tokens).logits)
    assert torch.equal(outputs[0], outputs[1])
    with pytest.raises(FileExistsError):
        export_folder(folder / "adapter_config.json", folder / "adapter_model.safetensors", out, card)


def test_scan_in_small_chunks_gives_the_same_summary(base: Path, tmp_path: Path) -> None:
    folder = make_peft_adapter(base, tmp_path / "adapter", r=2, targets=ALL_LINEAR_TARGETS)
    assert read_folder(folder, limits=AdapterLimits(scan_chunk_bytes=64)) == read_folder(folder)
