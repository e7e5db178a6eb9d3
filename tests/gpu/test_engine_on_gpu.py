"""The engine on a CUDA device: the same answers as transformers and PEFT there, and memory that is really
freed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.inference.adapters.entry import AdapterState
from services.inference.engine.graphs import row_sizes
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

pytestmark = pytest.mark.gpu

MAX_TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def _full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_peft_adapter(base, root / name, r=rank, targets=ALL_LINEAR_TARGETS, seed=seed)
        for seed, (name, rank) in enumerate((("a", 4), ("b", 8), ("c", 16), ("d", 16)))
    }


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("kernels", "decode_graphs"),
    [("torch", "off"), ("torch", "eager"), ("triton", "off"), ("triton", "eager"), ("triton", "auto")],
)
def test_a_mixed_batch_equals_each_request_alone(
    quantization: str,
    kernels: str,
    decode_graphs: str,
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    if kernels == "triton":
        pytest.importorskip("triton")
    reference = Reference(base, adapters, nf4=quantization == "nf4", device="cuda")
    engine = make_engine(
        base,
        tmp_path / "cache",
        FolderFetcher(adapters),
        quantization=quantization,
        device="cuda",
        kernels=kernels,
        decode_graphs=decode_graphs,
    )
    graphs = engine._runner._graphs
    assert (graphs is None) == (decode_graphs == "off")
    assert graphs is None or len(graphs) == 2 * len(row_sizes(32))
    draw = random.Random(5)
    choices: list[str | None] = [*adapters, None]
    work = [
        (f"r{i}", [draw.randrange(6, VOCAB_SIZE) for _ in range(draw.choice((1, 7, 33)))], choices[i % 5])
        for i in range(16)
    ]
    for name, prompt, adapter in work:
        engine.add(request(name, prompt, adapter, max_tokens=MAX_TOKENS))
    events = run_all(engine)
    for name, prompt, adapter in work:
        assert tokens_of(events[name]) == reference.generate(prompt, adapter, MAX_TOKENS), (name, adapter)
    engine.adapters.close()


def test_an_evicted_adapter_frees_its_device_memory(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    engine = make_engine(base, tmp_path / "cache", FolderFetcher(adapters), device="cuda")
    engine.add(request("warm", [9, 9, 9], max_tokens=2))
    run_all(engine)
    before = torch.cuda.memory_allocated()
    engine.add(request("r", [9, 9, 9], "c", max_tokens=2))
    run_all(engine)
    (entry,) = engine.adapters.residency()
    assert entry.state is AdapterState.DEVICE
    assert torch.cuda.memory_allocated() >= before + entry.size_bytes
    assert engine.adapters.evict(digest_of("c"))
    engine.add(request("base", [9, 9, 9], max_tokens=2))
    run_all(engine)
    assert torch.cuda.memory_allocated() <= before
    engine.adapters.close()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_bfloat16_is_near_float32_and_nearest_to_its_own_adapter(
    quantization: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Greedy choices of tiny random models flip with roundings, so log-probabilities are compared: those that
    the engine gives to a prompt, beside those of transformers and PEFT in float32, of every adapter.
    """
    reference = Reference(base, adapters, nf4=quantization == "nf4", device="cuda")
    engine = make_engine(
        base,
        tmp_path / "cache",
        FolderFetcher(adapters),
        quantization=quantization,
        device="cuda",
        compute_dtype="bfloat16",
    )
    draw = random.Random(7)
    names: list[str | None] = [*adapters, None]
    prompts = {name: [draw.randrange(6, VOCAB_SIZE) for _ in range(40)] for name in names}
    for name, prompt in prompts.items():
        engine.add(request(str(name), prompt, name, max_tokens=1, prompt_logprobs=0))
    events = run_all(engine)
    engine.adapters.close()
    for name, prompt in prompts.items():
        (found,) = [event.prompt_logprobs for event in events[str(name)] if event.prompt_logprobs]
        errors = {}
        for other in names:
            logprobs = torch.log_softmax(reference.logits(prompt, other).float(), dim=-1).cpu()
            wanted = [float(logprobs[at, token]) for at, token in enumerate(prompt[1:])]
            errors[other] = sum(
                abs(item.logprob - value) for item, value in zip(found, wanted, strict=True)
            ) / len(wanted)
        assert min(errors, key=lambda other: errors[other]) == name
        assert errors[name] < 0.6, errors


def test_replayed_steps_are_those_of_the_kernels_one_by_one(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Adapters come and go between replays, and sequences end at unlike times."""
    pytest.importorskip("triton")
    answers: dict[str, dict[str, list[int]]] = {}
    for mode in ("eager", "auto"):
        engine = make_engine(
            base,
            tmp_path / mode,
            FolderFetcher(adapters),
            device="cuda",
            kernels="triton",
            decode_graphs=mode,
        )
        answers[mode] = {}
        for turn in range(3):
            choices: list[str | None] = [*list(adapters)[turn:], None]
            for number in range(7):
                name = f"{turn}.{number}"
                prompt = [6 + (5 * number + 3 * at + turn) % 250 for at in range(2 + 6 * number)]
                adapter = choices[number % len(choices)]
                engine.add(request(name, prompt, adapter, max_tokens=4 + 5 * number, ignore_eos=True))
            answers[mode] |= {name: tokens_of(events) for name, events in run_all(engine).items()}
            for name in list(adapters)[: turn + 1]:
                engine.adapters.evict(digest_of(name))
        engine.adapters.close()
    assert answers["auto"] == answers["eager"]


def test_captured_steps_take_no_more_memory_than_they_may(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    engine = make_engine(
        base, tmp_path, FolderFetcher({}), device="cuda", kernels="triton", decode_graph_bytes=1
    )
    graphs = engine._runner._graphs
    assert graphs is not None
    assert len(graphs) == 0
    engine.add(request("r", [9, 9, 9], max_tokens=3, ignore_eos=True))
    assert len(tokens_of(run_all(engine)["r"])) == 3
    engine.adapters.close()
