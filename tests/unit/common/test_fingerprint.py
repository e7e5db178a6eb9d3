"""The fingerprint changes with everything that changes the base's values, and with nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from services.common.errors import InvalidArgument
from services.common.fingerprint import (
    ComputeDtype,
    FingerprintCache,
    Quantization,
    QuantizationType,
    fingerprint_base,
    linear_module_table,
    num_parameters,
)
from tests.support.models import make_tiny_llama

NF4 = Quantization(QuantizationType.NF4, 64, True, ComputeDtype.BFLOAT16)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("base"), hidden_size=32, intermediate_size=48)


@pytest.fixture
def base(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "base"))


def edit_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip_one_bit(base: Path) -> None:
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_template(base: Path) -> None:
    path = base / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


@pytest.mark.parametrize(
    "change",
    [
        flip_one_bit,
        edit_template,
        lambda base: edit_json(base / "config.json", lambda c: c.update(rms_norm_eps=1e-3)),
        lambda base: edit_json(base / "tokenizer.json", lambda c: c.update(truncation={"max_length": 3})),
    ],
    ids=["weights", "chat_template", "config", "tokenizer"],
)
def test_changes_that_matter(base: Path, change: Callable[[Path], None]) -> None:
    before = fingerprint_base(base, NF4)
    change(base)
    after = fingerprint_base(base, NF4)
    assert after.digest != before.digest
    parts = ("weights_digest", "config_digest", "tokenizer_digest", "chat_template_digest")
    assert sum(getattr(after, part) != getattr(before, part) for part in parts) == 1


@pytest.mark.parametrize(
    "quantization",
    [
        replace(NF4, type=QuantizationType.FP4),
        replace(NF4, block_size=128),
        replace(NF4, double_quantization=False),
        Quantization.none(ComputeDtype.BFLOAT16),
    ],
)
def test_quantization_is_bound(base: Path, quantization: Quantization) -> None:
    assert fingerprint_base(base, quantization).digest != fingerprint_base(base, NF4).digest


def test_compute_dtype_is_recorded_but_not_bound(base: Path) -> None:
    other = fingerprint_base(base, replace(NF4, compute_dtype=ComputeDtype.FLOAT32))
    assert other.digest == fingerprint_base(base, NF4).digest
    assert other != fingerprint_base(base, NF4)


def test_shards_spelling_and_history_do_not_matter(base: Path) -> None:
    before = fingerprint_base(base, NF4)
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors, reverse=True)
    (base / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in names[:7]}, base / "model-00002-of-00002.safetensors")
    save_file(
        {name: tensors[name] for name in names[7:]}, base / "model-00001-of-00002.safetensors", {"a": "b"}
    )
    edit_json(base / "config.json", lambda c: c.update(transformers_version="0", use_cache=False))
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=7, sort_keys=True))
    assert fingerprint_base(base, NF4) == before


def test_template_inside_tokenizer_config(base: Path) -> None:
    before = fingerprint_base(base, NF4)
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    assert fingerprint_base(base, NF4).chat_template_digest != before.chat_template_digest
    edit_json(base / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    assert fingerprint_base(base, NF4) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_missing_files_are_named(base: Path, name: str) -> None:
    (base / name).unlink()
    with pytest.raises(InvalidArgument) as caught:
        fingerprint_base(base, NF4)
    assert caught.value.reason == "missing_file"


def test_one_tensor_in_two_shards(base: Path) -> None:
    shutil.copy(base / "model.safetensors", base / "other.safetensors")
    with pytest.raises(InvalidArgument) as caught:
        fingerprint_base(base, NF4)
    assert caught.value.reason == "duplicate_tensor"


def test_cache_sees_changed_weights_and_changed_text(base: Path) -> None:
    cache = FingerprintCache()
    assert cache.fingerprint(base, NF4) == cache.fingerprint(base, NF4) == fingerprint_base(base, NF4)
    flip_one_bit(base)
    assert cache.fingerprint(base, NF4) == fingerprint_base(base, NF4)
    edit_template(base)
    assert cache.fingerprint(base, NF4) == fingerprint_base(base, NF4)


def test_module_table_equals_the_models_linear_layers(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    expected = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert linear_module_table(base) == expected
    assert len(expected) == 14
    assert num_parameters(base) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "block_size", "double"),
    [
        (QuantizationType.NF4, 0, False),
        (QuantizationType.NF4, 65, False),
        (QuantizationType.FP4, 8192, False),
        (QuantizationType.NONE, 64, False),
        (QuantizationType.NONE, 0, True),
    ],
)
def test_impossible_quantization(kind: QuantizationType, block_size: int, double: bool) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Quantization(kind, block_size, double, ComputeDtype.FLOAT32)
    assert caught.value.reason == "bad_quantization"
