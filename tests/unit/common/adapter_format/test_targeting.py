"""Layers are ruled in and out as PEFT itself does it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from services.common.adapter_format import read_adapter
from services.common.adapter_format.targeting import parse_targeting
from services.common.errors import InvalidArgument
from tests.support.adapter_files import MODULE, config_bytes, lora_tensors, safetensors_bytes, write_weights

part = st.sampled_from(["a", "b", "layers", "h", "0", "1", "12"])
names = st.lists(part, min_size=1, max_size=6).map(".".join)
name_lists = st.lists(names, min_size=1, max_size=3)


@settings(max_examples=600, deadline=None)
@given(
    name_lists,
    st.none() | st.just([]) | name_lists,
    st.none() | st.just([]) | st.integers(0, 12) | st.lists(st.sampled_from([0, 1, 12]), min_size=1),
    st.none() | st.just("layers") | st.just(["h", "layers"]),
    names,
)
@example(["a"], None, [1], None, "b.layers.1.0.a")
@example(["a"], None, [1], ["layers"], "layers.1.a")
@example(["a"], ["layers.1.a"], None, None, "h.layers.1.a")
@example(["h.layers.0.a"], None, [1], None, "h.layers.0.a")
def test_layers_are_chosen_as_in_peft(
    targets: list[str], excluded: Any, layers: Any, layer_lists: Any, module: str
) -> None:
    if layers in (None, []):
        layer_lists = None
    config = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": layer_lists,
    }
    peft = check_target_module_exists(SimpleNamespace(**config), module)
    assert parse_targeting(config).includes(module) == bool(peft)


@pytest.mark.parametrize(
    "config",
    [
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": [MODULE], "target_modules": "all-linear"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
    ],
)
def test_018_a_layer_that_the_config_rules_out(tmp_path: Path, config: dict[str, object]) -> None:
    path = write_weights(tmp_path, safetensors_bytes(lora_tensors()))
    with pytest.raises(InvalidArgument) as caught:
        read_adapter(config_bytes(**config), path)
    assert caught.value.reason == "unexpected_tensor"


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"exclude_modules": ["k_proj"]},
        {"exclude_modules": []},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0, 7], "layers_pattern": ["layers"]},
        {"target_modules": [MODULE], "layers_to_transform": [7]},
    ],
)
def test_a_layer_that_the_config_allows(tmp_path: Path, config: dict[str, object]) -> None:
    path = write_weights(tmp_path, safetensors_bytes(lora_tensors()))
    summary = read_adapter(config_bytes(**config), path)
    assert [module.name for module in summary.modules] == [MODULE]


def test_all_linear_leaves_the_output_out() -> None:
    targeting = parse_targeting({"target_modules": "all-linear"})
    assert targeting.includes("model.layers.0.mlp.up_proj")
    assert not targeting.includes("lm_head")
