"""The engine's mixed batches against transformers and PEFT, one request at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.inference.engine.engine import Engine
from tests.support.engines import (
    FolderFetcher,
    Reference,
    digest_of,
    make_engine,
    request,
    run_all,
    tokens_of,
)
from tests.support.models import ALL_LINEAR_TARGETS, VOCAB_SIZE, make_peft_adapter, make_tiny_llama

MAX_TOKENS = 24
NAMES = ("qv-4", "all-8", "rslora-16", "pattern-8")
QUANTIZATIONS = ("none", "nf4")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "qv-4": make_peft_adapter(base, root / "a", r=4, seed=1),
        "all-8": make_peft_adapter(base, root / "b", r=8, targets=ALL_LINEAR_TARGETS, seed=2),
        "rslora-16": make_peft_adapter(base, root / "c", r=16, use_rslora=True, lora_alpha=8, seed=3),
        "pattern-8": make_peft_adapter(
            base,
            root / "d",
            r=8,
            targets=ALL_LINEAR_TARGETS,
            rank_pattern={"q_proj": 4, "layers.1.mlp.up_proj": 2},
            alpha_pattern={"down_proj": 24},
            seed=4,
        ),
    }


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def quantization(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(base: Path, adapters: dict[str, Path], quantization: str) -> Reference:
    return Reference(base, adapters, nf4=quantization == "nf4")


@pytest.fixture
def engine_of(base: Path, adapters: dict[str, Path], quantization: str, tmp_path: Path) -> Iterator[Any]:
    engines: list[Engine] = []

    def make(**settings: Any) -> Engine:
        fetcher = FolderFetcher(adapters)
        engines.append(make_engine(base, tmp_path / "cache", fetcher, quantization=quantization, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.adapters.close()


def mixed_requests() -> list[tuple[str, list[int], str | None]]:
    """Sixteen prompts of unlike lengths over four adapters and the base."""
    draw = random.Random(11)
    choices: list[str | None] = [*NAMES, None]
    return [
        (
            f"r{number}",
            [draw.randrange(6, VOCAB_SIZE) for _ in range(draw.choice((1, 2, 7, 16, 33)))],
            choices[number % 5],
        )
        for number in range(16)
    ]


def assert_same_as_alone(engine: Engine, reference: Reference) -> None:
    work = mixed_requests()
    for name, prompt, adapter in work:
        engine.add(request(name, prompt, adapter, max_tokens=MAX_TOKENS))
    events = run_all(engine)
    for name, prompt, adapter in work:
        assert tokens_of(events[name]) == reference.generate(prompt, adapter, MAX_TOKENS), (name, adapter)
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert all(entry.leases == 0 and entry.pins == 0 for entry in engine.adapters.residency())


def test_a_mixed_batch_equals_each_request_alone(engine_of: Any, reference: Reference) -> None:
    engine = engine_of()
    assert_same_as_alone(engine, reference)
    assert engine.stats().steps < 16 * MAX_TOKENS / 4, "the requests did not share steps"


def test_chunked_prefill_changes_nothing(engine_of: Any, reference: Reference) -> None:
    assert_same_as_alone(engine_of(max_batch_tokens=17, max_num_seqs=16), reference)


def test_preemption_changes_nothing(engine_of: Any, reference: Reference) -> None:
    engine = engine_of(kv_bytes=80 * 2048, max_model_len=64)
    assert_same_as_alone(engine, reference)
    assert engine.stats().preemptions > 0


def test_a_device_too_small_for_all_adapters_changes_nothing(engine_of: Any, reference: Reference) -> None:
    sizes = engine_of(adapter_device_bytes=1 << 30)
    for name in NAMES:
        sizes.add(request(name, [9], name, max_tokens=1))
    run_all(sizes)
    largest = max(entry.size_bytes for entry in sizes.adapters.residency())
    engine = engine_of(adapter_device_bytes=largest + 1, adapter_host_bytes=1 << 20)
    assert_same_as_alone(engine, reference)
    assert engine.adapters.stats().device_evictions > 0


def test_an_adapter_evicted_and_loaded_again_answers_the_same(engine_of: Any, reference: Reference) -> None:
    engine = engine_of()
    for round_number in range(2):
        name = f"round{round_number}"
        engine.add(request(name, [10, 20, 30], "all-8", max_tokens=MAX_TOKENS))
        events = run_all(engine)
        assert tokens_of(events[name]) == reference.generate([10, 20, 30], "all-8", MAX_TOKENS)
        assert engine.adapters.evict(digest_of("all-8"))
        assert engine.adapters.residency() == []
    assert engine.adapters.stats().loads == 2


def test_logprobs_of_a_mixed_batch_match(engine_of: Any, reference: Reference) -> None:
    engine = engine_of(max_batch_tokens=40)
    work = [item for item in mixed_requests() if len(item[1]) > 1]
    for name, prompt, adapter in work:
        engine.add(request(name, prompt, adapter, max_tokens=4, logprobs=3, prompt_logprobs=2))
    events = run_all(engine)
    for name, prompt, adapter in work:
        tokens = tokens_of(events[name])
        expected = torch.log_softmax(reference.logits([*prompt, *tokens], adapter), dim=-1)
        scored = events[name][0].prompt_logprobs
        assert scored is not None
        assert [item.token_id for item in scored] == prompt[1:]
        chosen = [item for event in events[name] for item in event.logprobs]
        for position, item in enumerate([*scored, *chosen]):
            assert item.logprob == pytest.approx(expected[position, item.token_id].item(), abs=1e-4)
            for token, logprob in item.top:
                assert logprob == pytest.approx(expected[position, token].item(), abs=1e-4)
            assert len(item.top) == (2 if position < len(scored) else 3)
