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
        name: make_peft_adapter(base, root / name, r=rank, targets=ALL_LINEAR_TARGETS, seed=rank)
        for name, rank in (("a", 4), ("b", 8), ("c", 16), ("d", 16))
    }


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_mixed_batch_equals_each_request_alone(
    quantization: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    reference = Reference(base, adapters, nf4=quantization == "nf4", device="cuda")
    engine = make_engine(
        base, tmp_path / "cache", FolderFetcher(adapters), quantization=quantization, device="cuda"
    )
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
