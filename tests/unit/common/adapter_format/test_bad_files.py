"""Every bad input of the catalogue that concerns the format, one test each, by its number."""

from __future__ import annotations

import json
import pickle
import socket
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from services.common.adapter_format import (
    DEFAULT_LIMITS,
    AdapterLimits,
    AdapterSummary,
    check_file_names,
    read_adapter,
)
from services.common.errors import Code, LorafleetError
from tests.support.adapter_files import (
    A_NAME,
    B_NAME,
    IN_FEATURES,
    MODULE,
    OUT_FEATURES,
    Tensors,
    config_bytes,
    f32,
    from_array,
    header_of,
    lora_tensors,
    safetensors_bytes,
    write_weights,
)

BASE = {MODULE: (IN_FEATURES, OUT_FEATURES)}


def read(
    folder: Path,
    config: bytes | None = None,
    weights: bytes | None = None,
    limits: AdapterLimits = DEFAULT_LIMITS,
) -> AdapterSummary:
    path = write_weights(folder, safetensors_bytes(lora_tensors()) if weights is None else weights)
    return read_adapter(config_bytes() if config is None else config, path, base_modules=BASE, limits=limits)


def refused(call: Callable[[], object]) -> LorafleetError:
    with pytest.raises(LorafleetError) as caught:
        call()
    return caught.value


def with_header(
    change: Callable[[dict[str, dict[str, object]]], None], tensors: Tensors | None = None
) -> bytes:
    tensors = tensors or lora_tensors()
    header = header_of(tensors)
    change(header)
    return safetensors_bytes(tensors, header=json.dumps(header).encode())


def test_the_good_file_that_the_bad_ones_differ_from(tmp_path: Path) -> None:
    summary = read(tmp_path)
    assert [module.scale for module in summary.modules] == [2.0]
    assert summary.num_parameters == 2 * (IN_FEATURES + OUT_FEATURES)


@pytest.mark.parametrize("name", ["adapter_model.bin", "model.pt", "ADAPTER_MODEL.BIN", "a.pkl"])
def test_001_pickle_offered(name: str) -> None:
    error = refused(lambda: check_file_names(["adapter_config.json", name]))
    assert error.reason == "unsafe_weight_format"


@pytest.mark.parametrize(
    "data",
    [
        *(pickle.dumps({"a": list(range(50))}, protocol=p) for p in range(6)),
        b"PK\x03\x04" + bytes(100),
        b"GGUF\x03\x00\x00\x00" + bytes(100),
        b"\x1f\x8b\x08" + bytes(100),
        b"short",
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_002_not_safetensors(tmp_path: Path, data: bytes) -> None:
    assert refused(lambda: read(tmp_path, weights=data)).reason == "not_safetensors"


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_002_a_length_that_looks_like_a_pickle_is_a_length(tmp_path: Path, length: int) -> None:
    tensors = lora_tensors()
    header = json.dumps(header_of(tensors)).encode().ljust(length)
    assert read(tmp_path, weights=safetensors_bytes(tensors, header=header)).max_rank == 2


@pytest.mark.parametrize("length", [DEFAULT_LIMITS.max_header_bytes + 1, 10**9, 2**40])
def test_003_header_longer_than_the_cap(tmp_path: Path, length: int) -> None:
    path = write_weights(tmp_path, length.to_bytes(8, "little") + b"{" + bytes(5 * 1024 * 1024))
    config = config_bytes()
    tracemalloc.start()
    start = time.perf_counter()
    error = refused(lambda: read_adapter(config, path))
    seconds = time.perf_counter() - start
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.reason == "header_too_large"
    assert peak_bytes < 1024 * 1024
    assert seconds < 0.05


def test_003_header_longer_than_the_file(tmp_path: Path) -> None:
    assert (
        refused(lambda: read(tmp_path, weights=(50).to_bytes(8, "little") + b"{}")).reason
        == "header_too_large"
    )


@pytest.mark.parametrize("length", [2**63, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("rest", [b"", b"{", b"{}" + bytes(100)])
def test_004_header_length_at_the_sign_bit(tmp_path: Path, length: int, rest: bytes) -> None:
    data = length.to_bytes(8, "little") + rest
    assert refused(lambda: read(tmp_path, weights=data)).reason == "header_too_large"


@pytest.mark.parametrize("bad", [b'{"\xff":1}', b'{"a":"\xed\xa0\x80"}', b'{"\xc0\xaf":1}'])
def test_005_header_not_utf8(tmp_path: Path, bad: bytes) -> None:
    assert (
        refused(lambda: read(tmp_path, weights=safetensors_bytes({}, header=bad))).reason == "header_not_utf8"
    )


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b'{"a":}',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"' + b'\\"' * 500_000,
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"\\ud800","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}',
        b'{"a":3}',
        b'{"__metadata__":{"a":1}}',
        b'{"__metadata__":[]}',
    ],
)
def test_006_header_is_broken_json(tmp_path: Path, bad: bytes) -> None:
    start = time.perf_counter()
    error = refused(lambda: read(tmp_path, weights=safetensors_bytes({}, header=bad)))
    assert error.reason == "header_bad_json"
    assert time.perf_counter() - start < 2
    assert len(error.message) <= 500


def test_007_duplicate_tensor(tmp_path: Path) -> None:
    entry = json.dumps(header_of(lora_tensors())[A_NAME])
    header = f'{{"{A_NAME}":{entry},"{A_NAME}":{entry}}}'.encode()
    error = refused(lambda: read(tmp_path, weights=safetensors_bytes(lora_tensors(), header=header)))
    assert error.reason == "duplicate_tensor"
    assert A_NAME in error.message


def offsets(begin: object, end: object) -> Callable[[dict[str, dict[str, object]]], None]:
    def change(header: dict[str, dict[str, object]]) -> None:
        header[B_NAME]["data_offsets"] = [begin, end]

    return change


@pytest.mark.parametrize(
    "change",
    [offsets(0, 40), offsets(47, 87), offsets(49, 89), offsets(1000, 1040), offsets(-1, 39), offsets(88, 48),
     offsets(48.0, 88), offsets(True, 41), offsets(2**64, 2**64 + 40), offsets("48", 88)],
)  # fmt: skip
def test_008_bad_offsets(tmp_path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    assert refused(lambda: read(tmp_path, weights=with_header(change))).reason == "bad_offsets"


def test_008_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    data = safetensors_bytes(lora_tensors()) + b"\0"
    assert refused(lambda: read(tmp_path, weights=data)).reason == "bad_offsets"


@pytest.mark.parametrize(
    "shape",
    [
        [5, 3],
        [],
        [2**32, 2**32],
        [2**63, 2],
        [5, -2],
        [5, 2.0],
        [True, 10],
        "5,2",
        None,
        [1] * 9,
        [10**100],
        [0, 2],
    ],
)
def test_009_bad_shape(tmp_path: Path, shape: object) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        header[B_NAME]["shape"] = shape

    assert refused(lambda: read(tmp_path, weights=with_header(change))).reason == "bad_shape"


@pytest.mark.parametrize("shape", [(10,), (5, 2, 1), (2, 0)])
def test_009_not_a_matrix(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = lora_tensors() | {B_NAME: f32(*shape)}
    assert refused(lambda: read(tmp_path, weights=safetensors_bytes(tensors))).reason == "bad_shape"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("position", [0, 517, 2047])
def test_010_non_finite(tmp_path: Path, value: float, dtype: str, position: int) -> None:
    def encode(array: npt.NDArray[np.generic]) -> tuple[str, tuple[int, ...], bytes]:
        if dtype == "BF16":
            return from_array(dtype, (array.astype("<f4").view("<u4") >> 16).astype("<u2"))
        return from_array(dtype, array.astype("<f2" if dtype == "F16" else "<f4"))

    b = np.full((1024, 2), 0.25, dtype="<f4")
    tensors = {A_NAME: encode(np.full((2, 6), 0.25, dtype="<f4")), B_NAME: encode(b)}
    path = write_weights(tmp_path, safetensors_bytes(tensors))
    limits = AdapterLimits(scan_chunk_bytes=1000)
    assert read_adapter(config_bytes(), path, limits=limits).dtype == dtype
    b.reshape(-1)[position] = value
    tensors[B_NAME] = encode(b)
    path = write_weights(tmp_path, safetensors_bytes(tensors))
    error = refused(lambda: read_adapter(config_bytes(), path, limits=limits))
    assert error.reason == "non_finite_weights"
    assert B_NAME in error.message


def test_010_scan_memory_is_bounded(tmp_path: Path) -> None:
    wide = 2_000_000
    tensors = {A_NAME: f32(2, wide, value=1e-3), B_NAME: f32(OUT_FEATURES, 2)}
    path = write_weights(tmp_path, safetensors_bytes(tensors))
    tensors.clear()
    tracemalloc.start()
    read_adapter(config_bytes(), path, limits=AdapterLimits(scan_chunk_bytes=64 * 1024))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4 * 1024 * 1024


@pytest.mark.parametrize("value", [1e4, 1e30, 3e38])
def test_011_absurd_magnitude(tmp_path: Path, value: float) -> None:
    tensors = {A_NAME: f32(2, IN_FEATURES, value=value), B_NAME: f32(OUT_FEATURES, 2, value=value)}
    assert (
        refused(lambda: read(tmp_path, weights=safetensors_bytes(tensors))).reason == "weights_out_of_range"
    )


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "2", None, [2], {}])
def test_012_bad_rank(tmp_path: Path, rank: object) -> None:
    error = refused(lambda: read(tmp_path, config_bytes(r=rank)))
    assert (error.reason, error.field) == ("bad_rank", "config.r")
    error = refused(lambda: read(tmp_path, config_bytes(rank_pattern={"q_proj": rank})))
    assert (error.reason, error.field) == ("bad_rank", "config.rank_pattern.q_proj")


@pytest.mark.parametrize(
    "changes", [{"r": 3}, {"rank_pattern": {"q_proj": 1}}, {"rank_pattern": {"self_attn.q_proj": 4}}]
)
def test_013_lying_config(tmp_path: Path, changes: dict[str, object]) -> None:
    error = refused(lambda: read(tmp_path, config_bytes(**changes)))
    assert (error.reason, error.value) == ("rank_mismatch", "2")
    assert error.limit in ("3", "1", "4")


def test_013_sides_of_different_rank(tmp_path: Path) -> None:
    tensors = lora_tensors() | {B_NAME: f32(OUT_FEATURES, 3)}
    assert refused(lambda: read(tmp_path, weights=safetensors_bytes(tensors))).reason == "rank_mismatch"


@pytest.mark.parametrize("rank", [DEFAULT_LIMITS.max_rank + 1, 10**9, 10**400])
def test_014_rank_too_large(tmp_path: Path, rank: int) -> None:
    error = refused(lambda: read(tmp_path, config_bytes(r=rank)))
    assert (error.reason, error.limit) == ("rank_too_large", str(DEFAULT_LIMITS.max_rank))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "key", ["(a+)+$", ".*q_proj", "q_proj|v_proj", "(?:a*)*b", "[a-z]", "", "q_proj$", "a..b", "x" * 300]
)
def test_015_hostile_pattern(tmp_path: Path, field: str, key: str) -> None:
    start = time.perf_counter()
    error = refused(lambda: read(tmp_path, config_bytes(**{field: {key: 2}})))
    assert (error.reason, error.field) == ("unsupported_field", f"config.{field}")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity"])
def test_016_alpha_is_no_json_number(tmp_path: Path, alpha: str) -> None:
    config = config_bytes().replace(b'"lora_alpha": 4', f'"lora_alpha": {alpha}'.encode())
    assert refused(lambda: read(tmp_path, config)).reason == "bad_config"


@pytest.mark.parametrize("alpha", [0, -1, -0.5, "4", True, None, 1e400, 10**400, [4]])
def test_016_bad_alpha(tmp_path: Path, alpha: object) -> None:
    data = config_bytes(lora_alpha=alpha).replace(b"Infinity", b"1e400")
    assert refused(lambda: read(tmp_path, data)).reason == "bad_alpha"
    data = config_bytes(alpha_pattern={"q_proj": alpha}).replace(b"Infinity", b"1e400")
    assert refused(lambda: read(tmp_path, data)).reason == "bad_alpha"


@pytest.mark.parametrize("missing", [A_NAME, B_NAME])
def test_017_missing_side(tmp_path: Path, missing: str) -> None:
    tensors = {name: tensor for name, tensor in lora_tensors().items() if name != missing}
    error = refused(lambda: read(tmp_path, weights=safetensors_bytes(tensors)))
    assert error.reason == "missing_tensor"
    assert missing in error.message


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.weight",
        "lm_head.weight",
        A_NAME.removeprefix("base_model.model."),
        A_NAME.removesuffix(".weight"),
        "base_model.model..lora_A.weight",
        "base_model.model.\u202e.lora_A.weight",
        "",
    ],
)
def test_018_unexpected_tensor(tmp_path: Path, name: str) -> None:
    tensors = lora_tensors() | {name: f32(2, 2)}
    assert refused(lambda: read(tmp_path, weights=safetensors_bytes(tensors))).reason == "unexpected_tensor"


def test_018_layer_outside_the_targets(tmp_path: Path) -> None:
    error = refused(lambda: read(tmp_path, config_bytes(target_modules=["v_proj"])))
    assert error.reason == "unexpected_tensor"
    error = refused(lambda: read(tmp_path, config_bytes(target_modules=["proj"])))
    assert error.reason == "unexpected_tensor"


@pytest.mark.parametrize(
    "base", [{}, {MODULE: (IN_FEATURES, OUT_FEATURES + 1)}, {MODULE: (OUT_FEATURES, IN_FEATURES)}]
)
def test_019_other_base(tmp_path: Path, base: dict[str, tuple[int, int]]) -> None:
    path = write_weights(tmp_path, safetensors_bytes(lora_tensors()))
    error = refused(lambda: read_adapter(config_bytes(), path, base_modules=base))
    assert error.reason == "base_mismatch"
    assert MODULE in error.message


@pytest.mark.parametrize("where", [None, "https://example.com/x", "/etc/passwd", "org/model"])
def test_021_base_name_is_text_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str | None
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_network)
    assert read(tmp_path, config_bytes(base_model_name_or_path=where)).declared_base == (where or "")


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"base_model_class": "Popen", "parent_library": "colorsys"}},
        {"megatron_core": "colorsys"},
        {"megatron_config": {}},
        {"trust_remote_code": True},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"R": 2},
        {"x" * 500: 1},
        {"auto_mapping": {"base_model_class": "A", "parent_library": "transformers.models.x", "more": "os"}},
        {"auto_mapping": {"base_model_class": "A", "parent_library": "transformers.models.x\nos"}},
        {"auto_mapping": {"base_model_class": "A", "parent_library": "transformers.models..x"}},
        {"auto_mapping": {"base_model_class": "A", "parent_library": "transformers.utils.hub"}},
        {"auto_mapping": {"base_model_class": "A.b", "parent_library": "transformers.models.x"}},
        {"auto_mapping": {"base_model_class": ["A"], "parent_library": "transformers.models.x"}},
        {"auto_mapping": "transformers.models.x"},
        {"auto_mapping": {}},
        {"exclude_modules": "(a+)+$"},
        {"layers_to_transform": [0], "layers_pattern": "(a+)+$"},
        {"target_modules": ".*q_proj"},
        {"target_modules": ["q_proj", "(a+)+"]},
        {"target_modules": [1]},
    ],
)
def test_022_code_and_unknown_keys(tmp_path: Path, changes: dict[str, object]) -> None:
    before = set(sys.modules)
    assert refused(lambda: read(tmp_path, config_bytes(**changes))).reason == "unsupported_field"
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": "lm_head"},
        {"modules_to_save": [["lm_head"]]},
        {"bias": "some"},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["experts.w"]},
        {"fan_in_fan_out": True},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "pissa_niter_4"},
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"task_type": "SEQ_CLS"},
        {"task_type": ["CAUSAL_LM"]},
    ],
)
def test_023_unsupported_feature(tmp_path: Path, changes: dict[str, object]) -> None:
    error = refused(lambda: read(tmp_path, config_bytes(**changes)))
    assert error.reason == "unsupported_feature"
    assert error.field == f"config.{next(iter(changes))}"


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        "base_model.model.lm_head.modules_to_save.weight",
    ],
)
def test_023_tensors_of_unsupported_features(tmp_path: Path, name: str) -> None:
    tensors = lora_tensors() | {name: f32(2, 2)}
    assert refused(lambda: read(tmp_path, weights=safetensors_bytes(tensors))).reason == "unsupported_feature"


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        lora_tensors() | {B_NAME: f32(OUT_FEATURES, 2, value=0)},
        lora_tensors() | {A_NAME: f32(2, 6, value=0)},
    ],
)
def test_024_adapter_without_effect(tmp_path: Path, tensors: Tensors) -> None:
    assert read(tmp_path, weights=safetensors_bytes(tensors)).warnings == ("noop_adapter",)


@pytest.mark.parametrize(
    ("dtype", "item_bytes"), [("F8_E4M3", 1), ("I8", 1), ("F64", 8), ("I32", 4), ("Q4", 1), (7, 1)]
)
def test_025_bad_dtype(tmp_path: Path, dtype: str, item_bytes: int) -> None:
    tensors = lora_tensors() | {B_NAME: (dtype, (OUT_FEATURES, 2), bytes(OUT_FEATURES * 2 * item_bytes))}
    assert refused(lambda: read(tmp_path, weights=safetensors_bytes(tensors))).reason == "bad_dtype"


def test_025_mixed_dtypes(tmp_path: Path) -> None:
    tensors = lora_tensors() | {B_NAME: from_array("F16", np.ones((OUT_FEATURES, 2), dtype="<f2"))}
    assert refused(lambda: read(tmp_path, weights=safetensors_bytes(tensors))).reason == "bad_dtype"


def test_026_empty_files(tmp_path: Path) -> None:
    assert refused(lambda: read(tmp_path, weights=b"")).reason == "missing_file"
    assert refused(lambda: read(tmp_path, config=b"")).reason == "missing_file"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "missing_file"),
        (["adapter_config.json"], "missing_file"),
        (["adapter_model.safetensors"], "missing_file"),
        (["adapter_config.json", "adapter_model.safetensors", "merges.txt"], "unexpected_file"),
        (["adapter_config.json", "../adapter_model.safetensors"], "unexpected_file"),
        (["adapter.zip"], "archives_not_supported"),
        (["adapter.tar.gz"], "archives_not_supported"),
    ],
)
def test_026_wrong_set_of_files(names: list[str], reason: str) -> None:
    assert refused(lambda: check_file_names(names)).reason == reason


def test_027_huge_config(tmp_path: Path) -> None:
    error = refused(lambda: read(tmp_path, config_bytes(peft_version="x" * 50_000_000)))
    assert (error.reason, error.code) == ("config_too_large", Code.RESOURCE_EXHAUSTED)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b'{"r":' + b"[" * 30_000 + b"]" * 30_000 + b"}", "bad_config"),
        (b'{"r":2,"r":2}', "duplicate_key"),
        (b'{"rank_pattern":{"a":1,"a":2}}', "duplicate_key"),
        (b"[]", "bad_config"),
        (b"{} {}", "bad_config"),
        (b"\xff\xfe{\0}\0", "bad_config"),
        (b'{"revision":"\\ud800"}', "bad_config"),
    ],
)
def test_027_malformed_config(tmp_path: Path, config: bytes, reason: str) -> None:
    assert refused(lambda: read(tmp_path, config)).reason == reason


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": []},
        {"target_modules": None},
        {"revision": 1},
        {"lora_dropout": 2},
        {"lora_dropout": True},
        {"inference_mode": "yes"},
        {"use_dora": 1},
        {"lora_bias": "true"},
        {"layers_to_transform": [0.5]},
        {"layers_to_transform": [True]},
        {"layers_to_transform": -1},
        {"layers_pattern": "layers"},
        {"exclude_modules": 3},
        {"rank_pattern": {"a" * n: 2 for n in range(1, 66)}},
        {"use_rslora": 1},
        {"rank_pattern": []},
        {"base_model_name_or_path": "x" * 2000},
    ],
)
def test_027_values_of_the_wrong_type(tmp_path: Path, changes: dict[str, object]) -> None:
    error = refused(lambda: read(tmp_path, config_bytes(**changes)))
    assert (error.reason, error.field) == ("bad_config", f"config.{next(iter(changes))}")


def test_032_weights_above_the_limit(tmp_path: Path) -> None:
    limits = AdapterLimits(max_weights_bytes=100)
    error = refused(lambda: read(tmp_path, limits=limits))
    assert (error.reason, error.code) == ("too_large", Code.RESOURCE_EXHAUSTED)
