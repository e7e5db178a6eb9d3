"""Every architecture that is served, against transformers and PEFT, one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.common.errors import LorafleetError, Unimplemented
from services.inference.engine.engine import Engine
from tests.support.architectures import ARCHITECTURES, write_tiny_model
from tests.support.engines import FolderFetcher, make_engine, request, run_all
from tests.support.models import make_peft_adapter
from tests.support.parity import (
    SCENARIOS,
    PeftReference,
    Scenarios,
    adapter_settings,
    assert_parity,
    make_adapters,
    mixed_work,
)

QUANTIZATIONS = ("none", "nf4")
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def build(base: Path, adapters: dict[str, Path], **settings: Any) -> Engine:
        cache = tmp_path / f"cache{len(engines)}"
        engines.append(make_engine(base, cache, FolderFetcher(adapters), **settings))
        return engines[-1]

    yield build
    for engine in engines:
        engine.adapters.close()


def write(name: str, path: Path) -> Path:
    return write_tiny_model(path, ARCHITECTURES[name].model_type, **ARCHITECTURES[name].settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_some_of_every_kind(name: str, make: MakeEngine, tmp_path: Path) -> None:
    """A diagonal of the whole matrix below: each quantisation and each adapter with many architectures."""
    architecture, number = ARCHITECTURES[name], list(ARCHITECTURES).index(name)
    base = write(name, tmp_path / "base")
    names = list(adapter_settings(architecture))
    some = [names[(number + 4 * step) % len(names)] for step in range(3)]
    adapters = make_adapters(base, tmp_path, architecture, list(dict.fromkeys([*some, "dora-8", "ends-8"])))
    quantization = QUANTIZATIONS[number % 2]
    reference = PeftReference(base, adapters, nf4=quantization == "nf4")
    engine = make(base, adapters, quantization=quantization, max_batch_tokens=48)
    assert_parity(engine, reference, mixed_work(list(adapters)), num_tokens=6)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_of_every_kind(
    name: str, quantization: str, kernels: str, make: MakeEngine, tmp_path: Path
) -> None:
    base = write(name, tmp_path / "base")
    adapters = make_adapters(base, tmp_path, ARCHITECTURES[name])
    reference = PeftReference(base, adapters, nf4=quantization == "nf4")

    def build(**settings: Any) -> Engine:
        return make(base, adapters, quantization=quantization, kernels=kernels, **settings)

    scenarios = Scenarios(build, reference, adapters)
    for scenario in SCENARIOS:
        getattr(scenarios, scenario)()


@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.has_experts])
def test_peft_adapters_of_experts_are_refused_by_name(name: str, make: MakeEngine, tmp_path: Path) -> None:
    base = write(name, tmp_path / "base")
    settings: dict[str, Any] = {"r": 4, "target_parameters": ["mlp.experts.down_proj"]}
    adapters = {"a": make_peft_adapter(base, tmp_path / "a", **settings)}
    engine = make(base, adapters)
    engine.add(request("r", [10, 20], "a"))
    (event,) = run_all(engine)["r"]
    assert isinstance(event.error, LorafleetError)
    assert (event.error.reason, event.error.field) == ("unsupported_feature", "config.target_parameters")
    assert "mlp.experts.down_proj" in event.error.message


@pytest.mark.parametrize(
    ("model_type", "settings", "reason", "why"),
    [
        ("falcon", {"alibi": True}, "architecture_unsupported", "its attention cannot be replaced"),
        ("mamba", {}, "architecture_unsupported", "its attention cannot be replaced"),
        ("bert", {}, "architecture_unsupported", "no list of decoder layers"),
        ("gpt2", {}, "architecture_unsupported", "no list of decoder layers"),
        (
            "deepseek_v3",
            {
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "q_lora_rank": 16,
            },
            "attention_feature_unsupported",
            "keys or values of (heads, size)",
        ),
    ],
)
def test_architectures_that_are_not_served_are_refused_when_loaded(
    model_type: str, settings: dict[str, Any], reason: str, why: str, make: MakeEngine, tmp_path: Path
) -> None:
    base = write_tiny_model(tmp_path / "base", model_type, **settings)
    with pytest.raises(Unimplemented) as caught:
        make(base, {})
    assert caught.value.reason == reason
    assert why in caught.value.message


def test_an_unknown_architecture_is_refused_when_loaded(make: MakeEngine, tmp_path: Path) -> None:
    base = write("llama", tmp_path / "base")
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "llama99"'))
    with pytest.raises(Unimplemented) as caught:
        make(base, {})
    assert caught.value.reason == "architecture_unsupported"


def test_attention_in_both_directions_is_refused_when_loaded(make: MakeEngine, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "gemma3_text", head_dim=16, use_bidirectional_attention=True)
    with pytest.raises(Unimplemented) as caught:
        make(base, {})
    assert caught.value.reason == "attention_feature_unsupported"
    assert "is_causal=False" in caught.value.message
