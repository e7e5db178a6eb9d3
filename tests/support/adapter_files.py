"""Adapter files made by hand, byte by byte, so that they can be wrong in one way at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]

MODULE = "model.layers.0.self_attn.q_proj"
A_NAME = f"base_model.model.{MODULE}.lora_A.weight"
B_NAME = f"base_model.model.{MODULE}.lora_B.weight"
IN_FEATURES = 6
OUT_FEATURES = 5


def config_bytes(**changes: object) -> bytes:
    """A small valid adapter_config.json for q_proj at rank 2, with `changes` on top."""
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
    }
    return json.dumps(config | changes).encode()


def f32(*shape: int, value: float = 0.5) -> tuple[str, tuple[int, ...], bytes]:
    """A float32 tensor filled with `value`."""
    return ("F32", shape, np.full(shape, value, dtype="<f4").tobytes())


def from_array(dtype: str, array: npt.NDArray[np.generic]) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor with the bytes of `array`, labelled `dtype`."""
    return (dtype, array.shape, array.tobytes())


def lora_tensors(rank: int = 2, *, seed: int | None = None) -> Tensors:
    """A and B of one layer; random where a seed is given."""
    if seed is None:
        return {A_NAME: f32(rank, IN_FEATURES), B_NAME: f32(OUT_FEATURES, rank)}
    random = np.random.default_rng(seed)
    return {
        A_NAME: from_array("F32", random.normal(size=(rank, IN_FEATURES)).astype("<f4")),
        B_NAME: from_array("F32", random.normal(size=(OUT_FEATURES, rank)).astype("<f4")),
    }


def header_of(tensors: Tensors) -> dict[str, dict[str, object]]:
    """The JSON header that describes `tensors`, laid out without holes in their order."""
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    return header


def safetensors_bytes(tensors: Tensors, *, header: bytes | None = None) -> bytes:
    """A safetensors file of `tensors`, with `header` in place of the right one where given."""
    text = json.dumps(header_of(tensors)).encode() if header is None else header
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def write_weights(folder: Path, data: bytes) -> Path:
    """Write `data` as the weights file of an adapter in `folder`, and return its path."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(data)
    return path
