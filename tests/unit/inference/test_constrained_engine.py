"""Constrained requests in the engine: in mixed batches, with chunks, preemption, n and seeds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from services.inference.constraints.grammar import ConstraintKind, matcher
from services.inference.engine.constraint import Constraint
from services.inference.engine.engine import Engine
from services.inference.engine.events import FinishReason, TokenEvent
from services.inference.engine.request import Request, SamplingParams
from tests.support.engines import (
    FolderFetcher,
    digest_of,
    make_engine,
    request,
    run_all,
    text_of,
    tokens_of,
)
from tests.support.models import make_peft_adapter, make_tiny_llama
from tests.unit.inference.test_constraints import POINT, byte_vocabulary, is_point

TOKENIZER = byte_vocabulary().compiled()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft_adapter(base, tmp_path_factory.mktemp("adapter") / "one", r=4)


def engine_of(base: Path, adapter: Path, tmp_path: Path, **settings: Any) -> Engine:
    return make_engine(base, tmp_path / "cache", FolderFetcher({"one": adapter}), **settings)


def constrained(
    name: str, kind: ConstraintKind, text: str, adapter: str | None = None, length: int = 5, **sampling: Any
) -> Request:
    made = Constraint(matcher(kind, text, TOKENIZER), f"sampling.{kind.value}", kind.reason)
    chosen: dict[str, Any] = {"temperature": 1.0, "max_tokens": 200, "seed": 3, **sampling}
    digest = None if adapter is None else digest_of(adapter)
    return Request(name, tuple(range(70, 70 + length)), SamplingParams(**chosen), digest, constraint=made)


def reason_of(events: list[TokenEvent], index: int = 0) -> FinishReason | None:
    return [event for event in events if event.index == index][-1].finish_reason


def test_constrained_rows_fit_beside_others_that_do_not_change(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    schema = json.dumps(POINT)
    wanted = [
        constrained("schema", ConstraintKind.JSON_SCHEMA, schema, n=3),
        constrained("adapter", ConstraintKind.JSON_SCHEMA, schema, "one", temperature=0.0),
        constrained("regex", ConstraintKind.REGEX, "(ab|cd){2,4}", "one", top_p=0.5),
        constrained("biased", ConstraintKind.REGEX, "[ab]+c", logit_bias={75: 100.0, 72: 5.0}),
    ]
    free = [request(f"free {number}", [80 + number], None, max_tokens=40) for number in range(3)]
    engine = engine_of(base, adapter, tmp_path)
    alone: dict[str, list[TokenEvent]] = {}
    for one in [*wanted, *free]:
        engine.add(one)
        alone |= run_all(engine)
    for one in [*wanted, *free]:
        engine.add(one)
    together = run_all(engine)
    for one in [*wanted, *free]:
        for index in range(one.sampling.n):
            assert tokens_of(together[one.id], index) == tokens_of(alone[one.id], index), one.id
    checked = 0
    for one in wanted:
        for index in range(one.sampling.n):
            if reason_of(together[one.id], index) is FinishReason.STOP:
                checked += 1
                text = text_of(together[one.id], index)
                if one.id in ("schema", "adapter"):
                    assert is_point(text), text
                elif one.id == "regex":
                    assert re.fullmatch("(ab|cd){2,4}", text)
                else:
                    assert re.fullmatch("[ab]+c", text)
    assert checked >= 4
    assert len({text_of(together["schema"], index) for index in range(3)}) > 1


def test_chunks_and_preemption_change_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    def requests() -> list[Request]:
        schema = json.dumps(POINT)
        return [
            constrained(f"r{n}", ConstraintKind.JSON_SCHEMA, schema, "one", length=40, seed=n, max_tokens=80)
            for n in range(6)
        ]

    roomy = engine_of(base, adapter, tmp_path / "roomy")
    for one in requests():
        roomy.add(one)
    undisturbed = run_all(roomy)
    block = roomy.stats().kv_block_bytes
    tight = engine_of(
        base, adapter, tmp_path / "tight", kv_bytes=45 * block, max_batch_tokens=12, max_num_seqs=6
    )
    for one in requests():
        tight.add(one)
    squeezed = run_all(tight)
    assert tight.stats().preemptions > 0
    for name, events in undisturbed.items():
        assert tokens_of(squeezed[name]) == tokens_of(events)
        if reason_of(events) is FinishReason.STOP:
            assert is_point(text_of(squeezed[name]))


def test_what_can_only_end_ends_without_an_end_token(base: Path, adapter: Path, tmp_path: Path) -> None:
    engine = engine_of(base, adapter, tmp_path)
    engine.add(constrained("r", ConstraintKind.REGEX, "abc"))
    events = run_all(engine)["r"]
    assert text_of(events) == "abc"
    assert len(tokens_of(events)) == 3
    assert (events[-1].finish_reason, events[-1].stop_cause) == (FinishReason.STOP, None)


def test_the_length_may_cut_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    engine = engine_of(base, adapter, tmp_path)
    engine.add(constrained("r", ConstraintKind.REGEX, "a{10}", max_tokens=4))
    events = run_all(engine)["r"]
    assert (text_of(events), events[-1].finish_reason) == ("aaaa", FinishReason.LENGTH)


def test_a_constraint_that_fails_ends_its_request_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    engine = engine_of(base, adapter, tmp_path)
    bad = constrained("bad", ConstraintKind.REGEX, "abcdef")
    assert bad.constraint is not None
    # As if a limit were exceeded on the way: the shared matcher stands elsewhere than the output.
    bad.constraint._matcher.consume_token(70 + 60)
    good = constrained("good", ConstraintKind.REGEX, "abcdef")
    engine.add(bad)
    engine.add(good)
    events = run_all(engine)
    error = events["bad"][-1].error
    assert error is not None
    assert (error.reason, error.field) == ("unsupported_regex", "sampling.regex")
    assert text_of(events["good"]) == "abcdef"
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total
