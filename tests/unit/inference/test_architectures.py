"""What bases may have besides their architecture: windows of any size, tied and grouped parts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition
from services.inference.engine.engine import Engine
from tests.support.engines import FolderFetcher, Reference, make_engine, request, run_all, tokens_of
from tests.support.models import (
    ALL_LINEAR_TARGETS,
    VOCAB_SIZE,
    make_peft_adapter,
    make_tiny_llama,
)


def assert_as_transformers(engine: Engine, reference: Reference, adapters: list[str | None]) -> None:
    draw = random.Random(2)
    work = [
        (f"r{i}-{adapter}", [draw.randrange(6, VOCAB_SIZE) for _ in range(length)], adapter)
        for i, length in enumerate((1, 5, 19, 40))
        for adapter in adapters
    ]
    for name, prompt, adapter in work:
        engine.add(request(name, prompt, adapter, max_tokens=12))
    events = run_all(engine)
    for name, prompt, adapter in work:
        assert tokens_of(events[name]) == reference.generate(prompt, adapter, 12), name
    engine.adapters.close()


@pytest.mark.parametrize("window", [2, 5, 16])
def test_a_sliding_window_in_whole_prompts_chunks_and_decoding(window: int, tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", sliding_window=window)
    adapters = {"a": make_peft_adapter(base, tmp_path / "a", targets=ALL_LINEAR_TARGETS)}
    reference = Reference(base, adapters)
    for number, settings in enumerate(({}, {"max_batch_tokens": 13, "max_num_seqs": 8})):
        engine = make_engine(base, tmp_path / f"cache{number}", FolderFetcher(adapters), **settings)
        assert_as_transformers(engine, reference, [None, "a"])


def test_tied_embeddings_and_grouped_heads(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", heads=8, kv_heads=1, tie_word_embeddings=True)
    adapters = {"a": make_peft_adapter(base, tmp_path / "a")}
    engine = make_engine(base, tmp_path / "cache", FolderFetcher(adapters))
    assert_as_transformers(engine, Reference(base, adapters), [None, "a"])


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        make_engine(tmp_path / "nothing", tmp_path / "cache", FolderFetcher({}))
    assert caught.value.reason == "base_missing"
