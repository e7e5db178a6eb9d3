"""The engine with the compiled kernels and with their torch forms gives the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from services.common.fingerprint import ComputeDtype, Quantization
from services.inference.engine.engine import Engine
from services.inference.kernels.library import load_kernels
from services.inference.model.decoder import FusedDecoderLayer
from services.inference.model.kernel_linear import KernelLoraLinear
from services.inference.model.loader import load_base
from tests.support.engines import FolderFetcher, make_engine, request, run_all, tokens_of
from tests.support.models import ALL_LINEAR_TARGETS, make_peft_adapter, make_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        f"a{rank}": make_peft_adapter(
            base, folder / f"a{rank}", r=rank, targets=ALL_LINEAR_TARGETS, seed=rank
        )
        for rank in (4, 7, 16)
    }


def serve(engine: Engine, adapters: dict[str, Path]) -> dict[str, list[int]]:
    """Decode base rows and rows of every adapter together, of unlike lengths; then close the engine."""
    for number, name in enumerate([None, *adapters, None, *adapters]):
        prompt = [6 + (7 * number + 3 * at) % 250 for at in range(3 + 5 * number)]
        engine.add(request(str(number), prompt, name, max_tokens=12, ignore_eos=True))
    tokens = {name: tokens_of(events) for name, events in run_all(engine).items()}
    engine.adapters.close()
    return tokens


def test_kernels_and_torch_forms_choose_the_same_tokens(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    made = {
        kernels: make_engine(base, tmp_path / kernels, FolderFetcher(adapters), kernels=kernels)
        for kernels in ("auto", "torch")
    }
    compiled = load_kernels() is not None
    for kernels, engine in made.items():
        modules = [type(module) for module in engine._base.model.modules()]
        assert (KernelLoraLinear in modules) == (compiled and kernels == "auto")
    assert serve(made["auto"], adapters) == serve(made["torch"], adapters)


def test_a_host_without_a_compiler_serves_with_the_torch_forms(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = serve(make_engine(base, tmp_path / "with", FolderFetcher(adapters)), adapters)
    monkeypatch.setenv("CC", str(tmp_path / "absent"))
    engine = make_engine(base, tmp_path / "without", FolderFetcher(adapters))
    assert engine._base.binding.kernel is None
    assert serve(engine, adapters) == wanted


def test_layers_of_the_llama_kind_are_fused_and_a_layer_that_differs_is_not(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no C compiler here")
    quantization = Quantization.none(ComputeDtype.FLOAT32)
    loaded = load_base(base, quantization, torch.device("cpu"), kernels)
    layers = loaded.model.get_decoder().layers
    assert all(isinstance(vars(layer)["forward"].__self__, FusedDecoderLayer) for layer in layers)

    plain = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: plain(self, x) * 1.5)
    other = load_base(base, quantization, torch.device("cpu"), kernels)
    for layer in other.model.get_decoder().layers:
        assert "forward" not in vars(layer)
