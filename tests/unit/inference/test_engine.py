"""How requests end, and that every end gives back all that was taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import AlreadyExists, DeadlineExceeded, InvalidArgument, Unavailable
from services.inference.engine.engine import Engine
from services.inference.engine.events import FinishReason, TokenEvent
from services.inference.engine.request import Request, SamplingParams
from tests.support.engines import FolderFetcher, digest_of, make_engine, request, run_all, text_of, tokens_of
from tests.support.models import (
    ALL_LINEAR_TARGETS,
    byte_tokenizer,
    make_peft_adapter,
    make_tiny_llama,
)

PROMPT = [40, 50, 60, 70]
TOKENIZER = byte_tokenizer()
# Keys and values, 2 layers, 4 tokens, 2 heads of 16 numbers of 4 bytes.
BLOCK_BYTES = 2 * 2 * 4 * 2 * 16 * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    deeper = make_tiny_llama(root / "deeper", layers=3)
    return {
        "one": make_peft_adapter(base, root / "one", seed=1),
        "two": make_peft_adapter(base, root / "two", seed=2),
        "deeper": make_peft_adapter(deeper, root / "foreign", targets=("down_proj",), seed=3),
    }


@pytest.fixture
def fetcher(adapters: dict[str, Path]) -> FolderFetcher:
    return FolderFetcher(adapters)


@pytest.fixture
def make(base: Path, fetcher: FolderFetcher, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def build(**settings: Any) -> Engine:
        engines.append(make_engine(base, tmp_path / "cache", fetcher, **settings))
        return engines[-1]

    yield build
    for engine in engines:
        engine.adapters.close()


@pytest.fixture
def engine(make: Callable[..., Engine]) -> Engine:
    return make()


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert all((entry.leases, entry.pins) == (0, 0) for entry in engine.adapters.residency())
    assert not engine.has_work


def greedy(engine: Engine, count: int = 16) -> list[int]:
    """Return what the base says after PROMPT, with no way to stop."""
    engine.add(request("greedy", PROMPT, max_tokens=count, ignore_eos=True))
    return tokens_of(run_all(engine)["greedy"])


def last(events: list[TokenEvent]) -> TokenEvent:
    assert [event for event in events if event.finish_reason is not None] == events[-1:]
    return events[-1]


def test_a_request_ends_at_max_tokens(engine: Engine) -> None:
    engine.add(request("r", PROMPT, "one", max_tokens=5, ignore_eos=True))
    events = run_all(engine)["r"]
    assert len(tokens_of(events)) == 5
    assert last(events).finish_reason is FinishReason.LENGTH
    assert (last(events).prompt_tokens, last(events).completion_tokens) == (4, 5)
    assert_nothing_is_held(engine)


def test_a_stop_token_ends_it_and_has_no_text(engine: Engine) -> None:
    tokens = greedy(engine)
    stop = tokens[6]
    first = tokens.index(stop)
    engine.add(request("r", PROMPT, ignore_eos=True, stop_token_ids=frozenset({stop})))
    events = run_all(engine)["r"]
    assert tokens_of(events) == tokens[: first + 1]
    assert (last(events).finish_reason, last(events).stop_cause) == (FinishReason.STOP, stop)
    assert text_of(events) == TOKENIZER.decode(PROMPT + tokens[:first])[len(TOKENIZER.decode(PROMPT)) :]
    assert_nothing_is_held(engine)


def test_the_end_of_sequence_token_ends_it_unless_ignored(engine: Engine) -> None:
    forced: dict[str, Any] = {"max_tokens": 3, "logit_bias": {0: 100.0}}
    engine.add(request("ends", PROMPT, **forced))
    engine.add(request("goes-on", PROMPT, ignore_eos=True, **forced))
    engine.add(request("later", PROMPT, min_tokens=2, **forced))
    events = run_all(engine)
    assert tokens_of(events["ends"]) == [0]
    assert (last(events["ends"]).finish_reason, last(events["ends"]).stop_cause) == (FinishReason.STOP, 0)
    assert tokens_of(events["goes-on"]) == [0, 0, 0]
    later = tokens_of(events["later"])
    assert len(later) == 3
    assert later[2] == 0
    assert 0 not in later[:2]


def test_a_stop_string_cuts_the_text_and_ends_it(engine: Engine) -> None:
    engine.add(request("whole", PROMPT, max_tokens=24, ignore_eos=True))
    whole = text_of(run_all(engine)["whole"])
    stop = next(whole[i : i + 2] for i in range(4, len(whole)) if "\ufffd" not in whole[i : i + 2])
    engine.add(request("r", PROMPT, max_tokens=24, ignore_eos=True, stop=("no such text", stop)))
    events = run_all(engine)["r"]
    assert text_of(events) == whole[: whole.index(stop)]
    assert (last(events).finish_reason, last(events).stop_cause) == (FinishReason.STOP, stop)
    assert_nothing_is_held(engine)


def test_n_sequences_of_one_request(engine: Engine) -> None:
    engine.add(request("r", PROMPT, "one", n=5, temperature=1.5, seed=7, max_tokens=8, ignore_eos=True))
    events = run_all(engine)["r"]
    outputs = [tuple(tokens_of(events, index)) for index in range(5)]
    assert len(set(outputs)) == 5
    assert {len(output) for output in outputs} == {8}
    engine.add(request("again", PROMPT, "one", n=5, temperature=1.5, seed=7, max_tokens=8, ignore_eos=True))
    engine.add(request("other", [9, 9, 9], "two", n=3, temperature=1.0, max_tokens=8))
    again = run_all(engine)["again"]
    assert [tuple(tokens_of(again, index)) for index in range(5)] == outputs
    assert_nothing_is_held(engine)


def test_without_a_seed_two_requests_differ(engine: Engine) -> None:
    for name in ("a", "b"):
        engine.add(request(name, PROMPT, temperature=2.0, max_tokens=16, ignore_eos=True))
    events = run_all(engine)
    assert tokens_of(events["a"]) != tokens_of(events["b"])


def test_a_seed_survives_preemption(make: Callable[..., Engine]) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 24, "ignore_eos": True}
    outputs = []
    for blocks in (2048, 16):
        engine = make(kv_bytes=blocks * BLOCK_BYTES, max_model_len=32)
        for number in range(6):
            engine.add(request(f"r{number}", [30 + number] * 5, "one", seed=number, **sampling))
        events = run_all(engine)
        outputs.append([tokens_of(events[f"r{number}"]) for number in range(6)])
        assert (engine.stats().preemptions > 0) == (blocks == 16)
    assert outputs[0] == outputs[1]


def test_abort_frees_blocks_pins_and_lease_at_any_moment(engine: Engine) -> None:
    for steps in (0, 1, 4):
        engine.add(request("r", PROMPT, "one", n=3, max_tokens=50, ignore_eos=True))
        deadline = time.monotonic() + 20
        while steps and not engine.can_progress:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for _ in range(steps):
            engine.step()
        assert engine.abort("r")
        assert not engine.abort("r")
        assert engine.step() == []
        assert_nothing_is_held(engine)


def test_a_failed_load_ends_only_its_own_requests(engine: Engine, fetcher: FolderFetcher) -> None:
    fetcher.errors[digest_of("two")] = Unavailable("registry_down", "The registry does not answer.")
    engine.add(request("good", PROMPT, "one", max_tokens=8, ignore_eos=True))
    engine.add(request("bad", PROMPT, "two", n=2, max_tokens=8))
    engine.add(request("base", PROMPT, max_tokens=8, ignore_eos=True))
    events = run_all(engine)
    assert [event.finish_reason for event in events["bad"]] == [FinishReason.ERROR] * 2
    assert {event.index for event in events["bad"]} == {0, 1}
    assert all(event.error is not None and event.error.reason == "registry_down" for event in events["bad"])
    assert len(tokens_of(events["good"])) == len(tokens_of(events["base"])) == 8
    with pytest.raises(Unavailable):
        engine.add(request("soon", PROMPT, "two"))
    assert_nothing_is_held(engine)


def test_an_adapter_for_a_layer_that_the_base_lacks_is_refused_by_name(engine: Engine) -> None:
    engine.add(request("r", PROMPT, "deeper"))
    (event,) = run_all(engine)["r"]
    assert event.error is not None
    expected = ("base_mismatch", "'model.layers.2.mlp.down_proj'")
    assert (event.error.reason, event.error.value) == expected


def test_running_streams_do_not_wait_for_a_slow_load(engine: Engine, fetcher: FolderFetcher) -> None:
    fetcher.delay_seconds[digest_of("two")] = 1.5
    engine.add(request("slow", PROMPT, "two", max_tokens=2))
    engine.add(request("fast", PROMPT, max_tokens=20, ignore_eos=True))
    started = time.monotonic()
    seen: list[TokenEvent] = []
    while not any(event.finish_reason for event in seen):
        seen += engine.step()
    assert {event.request_id for event in seen} == {"fast"}
    assert time.monotonic() - started < 1.4
    assert len(tokens_of(run_all(engine)["slow"])) == 2


def test_a_deadline_ends_a_request_with_its_name(base: Path, fetcher: FolderFetcher, make: Any) -> None:
    engine = make()
    hurried = Request(
        "r", tuple(PROMPT), SamplingParams(max_tokens=400, ignore_eos=True), None, time.monotonic() + 0.05
    )
    engine.add(hurried)
    events = run_all(engine)["r"]
    assert isinstance(last(events).error, DeadlineExceeded)
    waiting = Request("w", tuple(PROMPT), SamplingParams(), digest_of("two"), time.monotonic() + 0.05)
    fetcher.delay_seconds[digest_of("two")] = 0.5
    engine.add(waiting)
    assert isinstance(last(run_all(engine)["w"]).error, DeadlineExceeded)
    assert_nothing_is_held(engine)


def test_scoring_without_generation(engine: Engine) -> None:
    engine.add(request("r", PROMPT, "one", max_tokens=0, prompt_logprobs=0))
    (event,) = run_all(engine)["r"]
    assert event.prompt_logprobs is not None
    assert [item.token_id for item in event.prompt_logprobs] == PROMPT[1:]
    assert event.token_ids == ()
    assert event.finish_reason is FinishReason.LENGTH
    assert_nothing_is_held(engine)


def test_prompt_logprobs_survive_chunks_and_preemption(make: Callable[..., Engine]) -> None:
    prompt = [20 + number % 50 for number in range(30)]
    whole = make()
    whole.add(request("r", prompt, "one", max_tokens=0, prompt_logprobs=0))
    expected = run_all(whole)["r"][0].prompt_logprobs
    assert expected is not None
    tight = make(max_batch_tokens=9, max_num_seqs=4, kv_bytes=12 * BLOCK_BYTES)
    tight.add(request("first", prompt[:6], max_tokens=34, ignore_eos=True))
    for _ in range(4):
        tight.step()
    tight.add(request("r", prompt, "one", max_tokens=0, prompt_logprobs=0))
    scored = run_all(tight)["r"][0].prompt_logprobs
    assert scored is not None
    assert [item.logprob for item in scored] == pytest.approx([item.logprob for item in expected], abs=1e-4)


def test_a_live_id_is_refused(engine: Engine) -> None:
    engine.add(request("r", PROMPT))
    with pytest.raises(AlreadyExists):
        engine.add(request("r", PROMPT))
    engine.abort("r")


def test_what_can_never_fit_is_refused_at_the_door(make: Callable[..., Engine]) -> None:
    engine = make(kv_bytes=10 * BLOCK_BYTES)
    assert engine.limits.max_model_len == 40
    with pytest.raises(InvalidArgument) as caught:
        engine.add(request("r", [9] * 30, max_tokens=11))
    assert (caught.value.value, caught.value.limit) == ("41", "40")
    engine.add(request("fits", [9] * 30, max_tokens=10, ignore_eos=True))
    assert len(tokens_of(run_all(engine)["fits"])) == 10


def test_a_fault_in_ones_text_ends_that_one_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add(request("broken", PROMPT, max_tokens=8, ignore_eos=True))
    engine.add(request("whole", PROMPT, max_tokens=8, ignore_eos=True))
    engine.step()
    (broken,) = engine._live["broken"]

    def fail(token_id: int, *, look_for_stops: bool) -> tuple[str, str | None]:
        raise ValueError(token_id)

    monkeypatch.setattr(broken.text, "push", fail)
    events = run_all(engine)
    assert last(events["broken"]).error is not None
    assert last(events["broken"]).error.reason == "detokenization_failed"  # type: ignore[union-attr]
    assert last(events["whole"]).finish_reason is FinishReason.LENGTH
    assert_nothing_is_held(engine)


def test_base_rows_and_base_batches_do_no_adapter_work(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    widths: list[int] = []
    run = engine._runner.run

    def watched(batch: Any) -> Any:
        widths.append(sum(rows.end - rows.start for rows in batch.adapter_rows))
        return run(batch)

    monkeypatch.setattr(engine._runner, "run", watched)
    engine.add(request("base", PROMPT, max_tokens=4, ignore_eos=True))
    run_all(engine)
    assert widths == [0, 0, 0, 0]
    widths.clear()
    engine.add(request("warm", PROMPT, "one", max_tokens=1))
    run_all(engine)
    widths.clear()
    engine.add(request("base", PROMPT, n=3, max_tokens=2, ignore_eos=True))
    engine.add(request("one", PROMPT, "one", max_tokens=2, ignore_eos=True))
    run_all(engine)
    assert widths == [len(PROMPT), 1]


def test_adapters_of_all_linear_layers_and_of_two_share_a_batch(base: Path, tmp_path: Path) -> None:
    wide = make_peft_adapter(base, tmp_path / "wide", r=8, targets=ALL_LINEAR_TARGETS, seed=9)
    narrow = make_peft_adapter(base, tmp_path / "narrow", r=4, seed=8)
    engine = make_engine(base, tmp_path / "cache", FolderFetcher({"wide": wide, "narrow": narrow}))
    alone = {}
    for name in ("wide", "narrow"):
        engine.add(request(name, PROMPT, name, ignore_eos=True))
        alone[name] = tokens_of(run_all(engine)[name])
    for name in ("wide", "narrow"):
        engine.add(request(name, PROMPT, name, ignore_eos=True))
    together = run_all(engine)
    assert {name: tokens_of(events) for name, events in together.items()} == alone
    assert alone["wide"] != alone["narrow"]
    engine.adapters.close()
