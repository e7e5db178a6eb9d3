"""Every kind of adapter in every circumstance, against transformers and PEFT, one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.inference.engine.engine import Engine
from tests.support.architectures import ARCHITECTURES, write_tiny_model
from tests.support.engines import FolderFetcher, make_engine, request, run_all, tokens_of
from tests.support.models import make_peft_adapter
from tests.support.parity import SCENARIOS, PeftReference, Scenarios, assert_parity, make_adapters, mixed_work

ARCHITECTURE = ARCHITECTURES["llama-biases"]
CASES = (("none", "auto"), ("none", "torch"), ("nf4", "auto"))
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    return write_tiny_model(path, ARCHITECTURE.model_type, **ARCHITECTURE.settings)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(base, tmp_path_factory.mktemp("adapters"), ARCHITECTURE)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    quantization, kernels = request.param
    return quantization, kernels


@pytest.fixture(scope="module")
def reference(base: Path, adapters: dict[str, Path], case: tuple[str, str]) -> PeftReference:
    return PeftReference(base, adapters, nf4=case[0] == "nf4")


@pytest.fixture
def make(
    base: Path, adapters: dict[str, Path], case: tuple[str, str], tmp_path: Path
) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def build(folders: dict[str, Path] = adapters, **settings: Any) -> Engine:
        cache, fetcher = tmp_path / f"cache{len(engines)}", FolderFetcher(folders)
        quantization, kernels = case
        engine = make_engine(base, cache, fetcher, quantization=quantization, kernels=kernels, **settings)
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.adapters.close()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_all_kinds_together_equal_each_alone(
    scenario: str, make: MakeEngine, reference: PeftReference, adapters: dict[str, Path]
) -> None:
    getattr(Scenarios(make, reference, adapters), scenario)()


def test_the_same_tokens_as_the_loop_of_transformers(
    make: MakeEngine, reference: PeftReference, adapters: dict[str, Path]
) -> None:
    work = mixed_work(list(adapters), count=len(adapters) + 1, seed=9)
    engine = make()
    for item in work:
        engine.add(request(item.name, item.prompt, item.adapter, max_tokens=10, ignore_eos=True))
    events = run_all(engine)
    for item in work:
        expected = reference.generate(item.prompt, item.adapter, 10)
        assert tokens_of(events[item.name]) == expected, item.adapter


def test_many_adapters_of_one_kind_and_shape(
    make: MakeEngine, base: Path, case: tuple[str, str], tmp_path: Path
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "lora": {},
        "dora": {"use_dora": True},
        "bias": {"lora_bias": True, "bias": "lora_only"},
    }
    folders = {
        f"{kind}-{number}": make_peft_adapter(
            base, tmp_path / f"{kind}-{number}", r=6, targets=ARCHITECTURE.linears, seed=number, **settings
        )
        for kind, settings in kinds.items()
        for number in range(3)
    }
    reference = PeftReference(base, folders, nf4=case[0] == "nf4")
    assert_parity(make(folders), reference, mixed_work(list(folders), count=20))


def test_prompts_are_scored_by_each_rows_own_head(make: MakeEngine, reference: PeftReference) -> None:
    owners = ("whole-head-4", None, "ends-8", "dora-head-6", "few-4")
    prompt = [9, 80, 33, 120, 7, 250]
    engine = make(max_batch_tokens=33)
    for owner in owners:
        engine.add(request(f"r-{owner}", prompt, owner, max_tokens=1, prompt_logprobs=2))
    events = run_all(engine)
    for owner in owners:
        scored = events[f"r-{owner}"][0].prompt_logprobs
        assert scored is not None
        expected = torch.log_softmax(reference.logits(prompt, owner), dim=-1)
        for position, item in enumerate(scored):
            assert item.token_id == prompt[position + 1]
            assert item.logprob == pytest.approx(expected[position, item.token_id].item(), abs=1e-4)


def test_adapters_change_what_is_said(make: MakeEngine, adapters: dict[str, Path]) -> None:
    """Every adapter here has an effect of its own, so that a row with another's deltas would be seen."""
    engine = make()
    for name in (None, *adapters):
        engine.add(request(f"r-{name}", [11, 45, 201], name, max_tokens=8, ignore_eos=True))
    said = [tuple(tokens_of(events)) for events in run_all(engine).values()]
    assert len(set(said)) == len(said)
