"""Adapters with biases, magnitudes or an output head: what is read of them, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.common.adapter_format import AdapterKind, AdapterSummary, LoraModule, OutputHead, read_adapter
from services.common.errors import InvalidArgument
from tests.support.adapter_files import (
    B_NAME,
    IN_FEATURES,
    MODULE,
    OUT_FEATURES,
    Tensors,
    config_bytes,
    f32,
    lora_tensors,
    safetensors_bytes,
    write_weights,
)

PREFIX = "base_model.model."
B_BIAS = f"{PREFIX}{MODULE}.lora_B.bias"
BASE_BIAS = f"{PREFIX}{MODULE}.base_layer.bias"
MAGNITUDE = f"{PREFIX}{MODULE}.lora_magnitude_vector"
SCORE = f"{PREFIX}score.weight"
SCORE_BIAS = f"{PREFIX}score.bias"
VECTOR = f32(OUT_FEATURES)


def read(folder: Path, tensors: Tensors, **config: object) -> AdapterSummary:
    path = write_weights(folder, safetensors_bytes(tensors))
    return read_adapter(config_bytes(**config), path, base_modules={MODULE: (IN_FEATURES, OUT_FEATURES)})


def refusal(folder: Path, tensors: Tensors, **config: object) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        read(folder, tensors, **config)
    return caught.value


@pytest.mark.parametrize(
    ("kind", "more", "config"),
    [
        (AdapterKind.LORA, {}, {}),
        (AdapterKind.LORA, {}, {"bias": "lora_only"}),
        (AdapterKind.LORA_BIAS, {B_BIAS: VECTOR}, {"lora_bias": True}),
        (AdapterKind.LORA_BIAS, {BASE_BIAS: VECTOR}, {"bias": "lora_only"}),
        (AdapterKind.LORA_BIAS, {BASE_BIAS: VECTOR}, {"bias": "all"}),
        (AdapterKind.LORA_BIAS, {BASE_BIAS: VECTOR, B_BIAS: VECTOR}, {"bias": "all", "lora_bias": True}),
        (AdapterKind.LORA_SCALE, {MAGNITUDE: VECTOR}, {"use_dora": True}),
        (AdapterKind.HEAD, {SCORE: f32(3, 8)}, {"modules_to_save": ["score"]}),
        (
            AdapterKind.HEAD,
            {SCORE: f32(3, 8), SCORE_BIAS: f32(3)},
            {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"},
        ),
        (AdapterKind.HEAD, {PREFIX + "lm_head.weight": f32(9, 8)}, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_kinds_and_their_parameters(
    tmp_path: Path, kind: AdapterKind, more: Tensors, config: dict[str, object]
) -> None:
    tensors = lora_tensors() | more
    summary = read(tmp_path, tensors, **config)
    assert summary.kind is kind
    assert [module.name for module in summary.modules] == [MODULE]
    assert summary.num_parameters == sum(len(data) // 4 for _, _, data in tensors.values())
    assert (summary.head is not None) == (kind is AdapterKind.HEAD)


EMBEDDING = "model.embed_tokens"
EMBEDDING_A, EMBEDDING_B = (f"{PREFIX}{EMBEDDING}.lora_embedding_{side}" for side in "AB")
EMBEDDING_TENSORS = {EMBEDDING_A: f32(2, 30), EMBEDDING_B: f32(6, 2)}
WITH_EMBEDDING = ["q_proj", "embed_tokens"]


def read_embedding(folder: Path, tensors: Tensors, **config: object) -> AdapterSummary:
    path = write_weights(folder, safetensors_bytes(tensors))
    table = {MODULE: (IN_FEATURES, OUT_FEATURES), EMBEDDING: (30, 6)}
    return read_adapter(config_bytes(**{"target_modules": WITH_EMBEDDING} | config), path, base_modules=table)


def test_an_embedding_is_a_module_of_plain_lora(tmp_path: Path) -> None:
    tensors = lora_tensors() | EMBEDDING_TENSORS
    summary = read_embedding(tmp_path, tensors)
    assert summary.kind is AdapterKind.LORA
    assert summary.modules[0] == LoraModule(EMBEDDING, 2, 30, 6, 2.0, is_embedding=True)
    assert not summary.modules[1].is_embedding
    assert summary.num_parameters == sum(len(data) // 4 for _, _, data in tensors.values())


@pytest.mark.parametrize(
    ("change", "config", "reason", "value"),
    [
        ({EMBEDDING_A: None}, {}, "missing_tensor", EMBEDDING_A),
        ({EMBEDDING_A: f32(3, 30)}, {}, "rank_mismatch", 3),
        ({EMBEDDING_A: f32(2, 31)}, {}, "base_mismatch", (31, 6)),
        ({}, {"target_modules": ["q_proj"]}, "unexpected_tensor", EMBEDDING_A),
        ({}, {"target_modules": "all-linear"}, "unexpected_tensor", EMBEDDING_A),
        ({MAGNITUDE: VECTOR}, {"use_dora": True}, "unsupported_feature", EMBEDDING_A),
        ({f"{PREFIX}{EMBEDDING}.lora_A.weight": f32(2, 30)}, {}, "unsupported_feature", EMBEDDING_A),
    ],
)
def test_embeddings_that_are_refused(
    tmp_path: Path, change: dict[str, Any], config: dict[str, object], reason: str, value: object
) -> None:
    tensors = lora_tensors() | EMBEDDING_TENSORS | change
    with pytest.raises(InvalidArgument) as caught:
        read_embedding(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor}, **config)
    assert (caught.value.reason, caught.value.value) == (reason, repr(value))


def test_head_is_described(tmp_path: Path) -> None:
    tensors = lora_tensors() | {SCORE: f32(3, 8), SCORE_BIAS: f32(3)}
    assert read(tmp_path, tensors, modules_to_save=["score"]).head == OutputHead("score", 8, 3, True)


def test_a_head_of_the_base_has_the_bases_shape(tmp_path: Path) -> None:
    tensors = lora_tensors() | {f"{PREFIX}lm_head.weight": f32(9, 8)}
    path, config = (
        write_weights(tmp_path, safetensors_bytes(tensors)),
        config_bytes(modules_to_save=["lm_head"]),
    )
    table = {MODULE: (IN_FEATURES, OUT_FEATURES), "lm_head": (8, 9)}
    assert read_adapter(config, path, base_modules=table).head == OutputHead("lm_head", 8, 9, False)
    with pytest.raises(InvalidArgument) as caught:
        read_adapter(config, path, base_modules=table | {"lm_head": (8, 10)})
    assert (caught.value.reason, caught.value.value) == ("base_mismatch", "(8, 9)")


@pytest.mark.parametrize(
    ("missing", "config"),
    [
        (B_BIAS, {"lora_bias": True}),
        (MAGNITUDE, {"use_dora": True}),
        (SCORE, {"modules_to_save": ["score"]}),
        (SCORE, {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}),
        (f"{PREFIX}lm_head.weight", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_017_announced_and_missing(tmp_path: Path, missing: str, config: dict[str, object]) -> None:
    error = refusal(tmp_path, lora_tensors(), **config)
    assert (error.reason, error.value) == ("missing_tensor", repr(missing))


@pytest.mark.parametrize("without", [B_NAME, *(name for name in lora_tensors() if name != B_NAME)])
def test_017_a_vector_does_not_stand_for_a_matrix(tmp_path: Path, without: str) -> None:
    tensors = {name: tensor for name, tensor in lora_tensors().items() if name != without}
    assert refusal(tmp_path, tensors | {B_BIAS: VECTOR}, lora_bias=True).reason == "missing_tensor"


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [
        (B_BIAS, (OUT_FEATURES,), {}),
        (BASE_BIAS, (OUT_FEATURES,), {"lora_bias": False}),
        (MAGNITUDE, (OUT_FEATURES,), {}),
        (SCORE, (3, 8), {}),
        (SCORE, (3, 8), {"modules_to_save": ["lm_head"]}),
        (f"{PREFIX}lm_head.base_layer.weight", (3, 8), {"modules_to_save": ["lm_head"]}),
        (f"{PREFIX}model.layers.0.self_attn.k_proj.bias", (5,), {}),
    ],
)
def test_018_not_announced(
    tmp_path: Path, name: str, shape: tuple[int, ...], config: dict[str, object]
) -> None:
    error = refusal(tmp_path, lora_tensors() | {name: f32(*shape)}, **config)
    assert (error.reason, error.value) == ("unexpected_tensor", repr(name))


def test_023_biases_of_layers_that_are_not_adapted(tmp_path: Path) -> None:
    name = f"{PREFIX}model.layers.0.self_attn.k_proj.bias"
    error = refusal(tmp_path, lora_tensors() | {name: VECTOR}, bias="all")
    assert (error.reason, error.value) == ("unsupported_feature", repr(name))


@pytest.mark.parametrize(
    ("more", "config"),
    [
        ({B_BIAS: VECTOR, MAGNITUDE: VECTOR}, {"lora_bias": True, "use_dora": True}),
        ({MAGNITUDE: VECTOR, SCORE: f32(3, 8)}, {"use_dora": True, "modules_to_save": ["score"]}),
        (
            {SCORE: f32(3, 8), f"{PREFIX}lm_head.weight": f32(3, 8)},
            {"modules_to_save": ["score", "lm_head"]},
        ),
    ],
)
def test_023_two_kinds_at_once(tmp_path: Path, more: Tensors, config: dict[str, object]) -> None:
    assert refusal(tmp_path, lora_tensors() | more, **config).reason == "unsupported_feature"


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [
        (B_BIAS, (OUT_FEATURES + 1,), {"lora_bias": True}),
        (B_BIAS, (1, OUT_FEATURES), {"lora_bias": True}),
        (BASE_BIAS, (IN_FEATURES,), {"bias": "all"}),
        (MAGNITUDE, (OUT_FEATURES, 1), {"use_dora": True}),
        (SCORE, (3,), {"modules_to_save": ["score"]}),
        (SCORE, (0, 8), {"modules_to_save": ["score"]}),
    ],
)
def test_009_shapes_that_do_not_fit(
    tmp_path: Path, name: str, shape: tuple[int, ...], config: dict[str, object]
) -> None:
    error = refusal(tmp_path, lora_tensors() | {name: f32(*shape)}, **config)
    assert (error.reason, error.value) == ("bad_shape", repr(list(shape)))


KINDS = [
    (B_BIAS, (OUT_FEATURES,), {"lora_bias": True}),
    (BASE_BIAS, (OUT_FEATURES,), {"bias": "all"}),
    (MAGNITUDE, (OUT_FEATURES,), {"use_dora": True}),
    (SCORE, (3, 8), {"modules_to_save": ["score"]}),
]


@pytest.mark.parametrize(("name", "shape", "config"), KINDS)
@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "non_finite_weights"), (1e30, "weights_out_of_range")]
)
def test_010_011_values(
    tmp_path: Path, name: str, shape: tuple[int, ...], config: dict[str, object], value: float, reason: str
) -> None:
    error = refusal(tmp_path, lora_tensors() | {name: f32(*shape, value=value)}, **config)
    assert error.reason == reason


@pytest.mark.parametrize(("name", "shape", "config"), KINDS)
def test_025_dtype_of_vectors_and_heads(
    tmp_path: Path, name: str, shape: tuple[int, ...], config: dict[str, object]
) -> None:
    size = int(np.prod(shape))
    assert read(tmp_path, lora_tensors() | {name: ("BF16", shape, bytes(2 * size))}, **config).dtype == "F32"
    error = refusal(tmp_path, lora_tensors() | {name: ("I8", shape, bytes(size))}, **config)
    assert error.reason == "bad_dtype"


def test_024_a_bias_alone_is_an_effect(tmp_path: Path) -> None:
    still = lora_tensors() | {B_NAME: f32(OUT_FEATURES, 2, value=0)}
    assert read(tmp_path, still | {B_BIAS: VECTOR}, lora_bias=True).warnings == ()
    zero = f32(OUT_FEATURES, value=0)
    assert read(tmp_path, still | {B_BIAS: zero}, lora_bias=True).warnings == ("noop_adapter",)


def test_022_auto_mapping_is_text(tmp_path: Path) -> None:
    library = "transformers.models.zamba2.modeling_zamba2"
    before = set(sys.modules)
    mapping = {"base_model_class": "Zamba2ForCausalLM", "parent_library": library}
    assert read(tmp_path, lora_tensors(), auto_mapping=mapping, task_type=None).kind is AdapterKind.LORA
    assert set(sys.modules) == before
