"""Random damage to a good file is refused by a typed error, or the safetensors library reads it alike."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from services.common.adapter_format import read_adapter, read_header
from services.common.adapter_format.patterns import PatternTable
from services.common.errors import LorafleetError
from tests.support.adapter_files import (
    config_bytes,
    header_of,
    lora_tensors,
    safetensors_bytes,
    write_weights,
)

GOOD = safetensors_bytes(lora_tensors(seed=1))
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")


def check(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_weights(Path(folder), data)
        try:
            header = read_header(path)
        except LorafleetError:
            return
        with safe_open(path, "np") as file:
            assert set(file.keys()) == {tensor.name for tensor in header.tensors}
            for tensor in header.tensors:
                view = file.get_slice(tensor.name)
                assert (tuple(view.get_shape()), view.get_dtype()) == (tensor.shape, tensor.dtype)
        try:
            read_adapter(config_bytes(), path)
        except LorafleetError:
            return


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, HEADER_END + 4), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(-3, 3),
)
def test_flipped_bytes(changes: list[tuple[int, int]], length_change: int) -> None:
    data = bytearray(GOOD)
    for position, value in changes:
        data[position] = value
    check(bytes(data[:length_change]) if length_change < 0 else bytes(data) + bytes(length_change))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1), st.sampled_from(["dtype", "shape", "data_offsets", "more"]), json_values)
def test_replaced_values(index: int, key: str, value: object) -> None:
    header = header_of(lora_tensors(seed=1))
    header[list(header)[index]][key] = value
    check(safetensors_bytes(lora_tensors(seed=1), header=json.dumps(header).encode()))


keys = st.from_regex(r"\^?[ab]{1,2}(\.[ab]{1,2}){0,2}", fullmatch=True)
modules = st.text(alphabet="ab.", min_size=1, max_size=9)


@settings(max_examples=500, deadline=None)
@given(st.lists(keys, min_size=1, max_size=4, unique=True), modules)
@example(["a"], "ba")
@example(["b.a"], "bba")
@example(["^b", "b"], "a.b")
def test_patterns_match_as_in_peft(patterns: list[str], module: str) -> None:
    # PEFT answers with the pattern that fits, or with the module's own name.
    table = PatternTable({pattern: pattern for pattern in patterns})
    assert table.value_of(module, module) == get_pattern_key(patterns, module)
