"""The registry's record of a local base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.registry.v1 import base_model_pb2
from services.common.base_models import base_model
from services.common.errors import FailedPrecondition
from services.common.fingerprint import (
    BaseFingerprint,
    ComputeDtype,
    Quantization,
    QuantizationType,
    fingerprint_base,
)
from tests.support.models import make_tiny_llama


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "base", layers=1)


def nf4(base: Path) -> BaseFingerprint:
    return fingerprint_base(base, Quantization(QuantizationType.NF4, 64, True, ComputeDtype.FLOAT32))


def rewrite_config(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    config = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), "utf-8")


def test_record_says_what_the_folder_holds(base: Path) -> None:
    record = base_model("tiny", base, nf4(base))
    assert (record.name, record.architecture) == ("tiny", "LlamaForCausalLM")
    assert (record.hidden_size, record.num_layers) == (64, 1)
    assert (record.vocab_size, record.max_model_len) == (264, 512)
    modules = {module.name: (module.in_features, module.out_features) for module in record.linear_modules}
    assert modules["model.layers.0.self_attn.k_proj"] == (64, 32)
    assert modules["model.layers.0.mlp.down_proj"] == (128, 64)
    assert len(modules) == 7
    # Embedding and head, the layer's seven projections, and three norms.
    linear = sum(in_features * out_features for in_features, out_features in modules.values())
    assert record.num_parameters == 2 * 264 * 64 + linear + 3 * 64
    quantization = record.fingerprint.quantization
    assert (quantization.type, quantization.block_size) == (base_model_pb2.QUANTIZATION_TYPE_NF4, 64)
    assert record.fingerprint.digest == nf4(base).digest


def test_older_names_in_the_config_are_understood(base: Path) -> None:
    expected = base_model("tiny", base, nf4(base))
    fingerprint = nf4(base)
    rewrite_config(base, hidden_size=None, num_hidden_layers=None, max_position_embeddings=None)
    rewrite_config(base, n_embd=64, n_layer=1, n_positions=512)
    assert base_model("tiny", base, fingerprint) == expected


@pytest.mark.parametrize("field", ["architectures", "hidden_size", "vocab_size"])
def test_what_the_config_lacks_is_named(base: Path, field: str) -> None:
    fingerprint = nf4(base)
    rewrite_config(base, **{field: None})
    with pytest.raises(FailedPrecondition) as caught:
        base_model("tiny", base, fingerprint)
    assert (caught.value.reason, caught.value.field) == ("bad_config", field)
