"""Damaged adapters by the thousand: each is read, or refused by a typed error, and nothing else comes out."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from services.common.adapter_format import read_adapter
from services.common.errors import LorafleetError
from tests.support.adapter_files import (
    IN_FEATURES,
    MODULE,
    OUT_FEATURES,
    Tensors,
    config_bytes,
    f32,
    header_of,
    lora_tensors,
    safetensors_bytes,
)

VECTOR = f32(OUT_FEATURES)
PREFIX = f"base_model.model.{MODULE}"
# One good adapter of each kind.
GOOD: list[tuple[dict[str, object], Tensors]] = [
    ({}, {}),
    ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^" + MODULE: 3}, "use_rslora": True}, {}),
    ({"layers_to_transform": [0], "layers_pattern": ["layers"], "exclude_modules": ["k_proj"]}, {}),
    ({"lora_bias": True}, {f"{PREFIX}.lora_B.bias": VECTOR}),
    ({"bias": "all"}, {f"{PREFIX}.base_layer.bias": VECTOR}),
    ({"use_dora": True}, {f"{PREFIX}.lora_magnitude_vector": VECTOR}),
    (
        {"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
        {"base_model.model.score.weight": f32(3, 6), "base_model.model.score.bias": f32(3)},
    ),
    ({"auto_mapping": {"base_model_class": "A", "parent_library": "transformers.models.llama.x"}}, {}),
]
VALUES: list[object] = [
    None, True, False, 0, 1, -1, 2, 2**63, 10**400, 0.5, -0.0, 1e308, "", "a", "q_proj", "LORA", "F32", "\0",
    "(a+)+", "\ud800", [], [[]], [0], [1, 2], ["q_proj"], [None], {}, {"a": 1}, {"a": {"b": []}},
    {"q_proj": 10**400},
]  # fmt: skip

INSERTS = [b"{", b"}", b'"', b"[", b",", b"\0", b"\\u", b"\xff", b"9" * 30]
CONFIG_KEYS = ["r", "bias", "use_dora", "lora_bias", "modules_to_save", "auto_mapping", "x", "layers_pattern"]


def damaged_json(source: random.Random, value: object, keys: list[str]) -> object:
    """Replace, drop or add something somewhere in `value`."""
    if isinstance(value, dict) and value and source.random() < 0.9:
        result = dict(value)
        key = source.choice(list(result))
        match source.randrange(6):
            case 0:
                del result[key]
            case 1:
                result[source.choice(keys)] = source.choice(VALUES)
            case 2:
                result[key] = source.choice(VALUES)
            case _:
                result[key] = damaged_json(source, result[key], keys)
        return result
    if isinstance(value, list) and value and source.random() < 0.8:
        items = list(value)
        items[source.randrange(len(items))] = source.choice(VALUES)
        return items
    return source.choice(VALUES)


def damaged_bytes(source: random.Random, data: bytes) -> bytes:
    """Overwrite, cut or lengthen `data`."""
    result = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(max(1, len(result)))
        match source.randrange(4):
            case 0:
                result[at : at + 1] = source.randbytes(1)
            case 1:
                result[at:at] = source.choice(
                    [b"{", b"}", b'"', b"[", b",", b"\0", b"\\u", b"\xff", b"9" * 30]
                )
            case 2:
                del result[at : at + source.randint(1, 30)]
            case _:
                result[at:at] = result[at : at + 20]
    return bytes(result)


def damaged_adapter(source: random.Random) -> tuple[bytes, bytes]:
    """Return config and weights of a good adapter with damage in one or both."""
    changes, more = source.choice(GOOD)
    tensors = lora_tensors() | more
    config: object = json.loads(config_bytes(**changes))
    header: object = header_of(tensors)
    match source.randrange(4):
        case 0:
            config = damaged_json(source, config, CONFIG_KEYS)
        case 1:
            header = damaged_json(source, header, [*tensors, "__metadata__", "dtype", "shape"])
        case 2:
            config = damaged_json(source, config, CONFIG_KEYS)
            header = damaged_json(source, header, [*tensors, "__metadata__", "dtype", "shape"])
    config_data = json.dumps(config).encode()
    weights = safetensors_bytes(tensors, header=json.dumps(header).encode())
    if source.random() < 0.3:
        config_data = damaged_bytes(source, config_data)
    if source.random() < 0.3:
        weights = damaged_bytes(source, weights)
    return config_data, weights


def fuzz(folder: Path, seed: int, cases: int) -> Counter[str]:
    """Read `cases` damaged adapters; return how often each reason was given, "read" where none was."""
    source = random.Random(seed)
    outcomes: Counter[str] = Counter()
    path = folder / "weights"
    for case in range(cases):
        config, weights = damaged_adapter(source)
        path.write_bytes(weights)
        try:
            read_adapter(config, path, base_modules={MODULE: (IN_FEATURES, OUT_FEATURES)})
        except LorafleetError as error:
            outcomes[error.reason if error.field else f"no field: {error} in case {case}"] += 1
        else:
            outcomes["read"] += 1
    return outcomes


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_adapters(tmp_path: Path, seed: int) -> None:
    outcomes = fuzz(tmp_path, seed, 1500)
    assert not [outcome for outcome in outcomes if outcome.startswith("no field")]
    # The damage must reach every part of the reader, or the test shows nothing.
    assert {"read", "bad_rank", "unsupported_feature", "unexpected_tensor", "bad_offsets"} <= outcomes.keys()
    assert len(outcomes) >= 12, outcomes


@pytest.mark.slow
def test_a_hundred_thousand_damaged_adapters(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path, 3, 100_000)
    assert not [outcome for outcome in outcomes if outcome.startswith("no field")]
