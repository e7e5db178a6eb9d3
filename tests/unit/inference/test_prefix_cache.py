"""What the prefix cache finds changes nothing but the work: the same engine without it is the twin."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.inference.engine.engine import Engine
from services.inference.engine.events import TokenEvent
from services.inference.engine.request import Request
from tests.support.engines import FolderFetcher, make_engine, request, run_all, tokens_of
from tests.support.models import ALL_LINEAR_TARGETS, make_peft_adapter, make_tiny_llama

# Keys and values, 2 layers, 4 tokens, 2 heads of 16 numbers of 4 bytes.
BLOCK_BYTES = 2 * 2 * 4 * 2 * 16 * 4
PROMPT = [20 + number * 7 % 50 for number in range(26)]
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def fetcher(base: Path, tmp_path_factory: pytest.TempPathFactory) -> FolderFetcher:
    root = tmp_path_factory.mktemp("adapters")
    return FolderFetcher(
        {name: make_peft_adapter(base, root / name, seed=seed) for seed, name in enumerate(("one", "two"))}
    )


@pytest.fixture(scope="module")
def make(
    base: Path, fetcher: FolderFetcher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def build(**settings: Any) -> Engine:
        engines.append(make_engine(base, tmp_path_factory.mktemp("cache"), fetcher, **settings))
        return engines[-1]

    yield build
    for engine in engines:
        engine.adapters.close()


@pytest.fixture(scope="module")
def twin(make: MakeEngine) -> Engine:
    return make(enable_prefix_cache=False)


def run(engine: Engine, *requests: Request) -> dict[str, list[TokenEvent]]:
    """Run the requests together and see that nothing is held then."""
    for one in requests:
        engine.add(one)
    events = run_all(engine)
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert all((entry.leases, entry.pins) == (0, 0) for entry in engine.adapters.residency())
    return events


def cached(events: list[TokenEvent]) -> int:
    """Return what the last event says was found."""
    return events[-1].cached_tokens


@pytest.mark.parametrize("adapter", [None, "one"])
def test_a_hit_gives_the_same_tokens_for_less_work(
    make: MakeEngine, twin: Engine, adapter: str | None
) -> None:
    engine = make()
    first = run(engine, request("first", PROMPT, adapter, ignore_eos=True))["first"]
    computed = []
    compute = engine._runner.run
    engine._runner.run = lambda batch: computed.append(batch.input_ids.shape[1]) or compute(batch)  # type: ignore
    again = run(engine, request("again", PROMPT, adapter, ignore_eos=True))["again"]
    plain = run(twin, request("plain", PROMPT, adapter, ignore_eos=True))["plain"]
    assert tokens_of(first) == tokens_of(again) == tokens_of(plain)
    assert (cached(first), cached(again), cached(plain)) == (0, 24, 0)
    assert computed[0] == 2
    stats = engine.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (52, 24)
    assert stats.kv_blocks_cached > 0
    assert twin.stats().kv_blocks_cached == 0


def test_what_was_said_is_found_in_the_next_turn(make: MakeEngine, twin: Engine) -> None:
    engine = make()
    first = run(engine, request("first", PROMPT, "one", max_tokens=11, ignore_eos=True))["first"]
    history = PROMPT + tokens_of(first) + [33, 44]
    second = run(engine, request("second", history, "one", ignore_eos=True))["second"]
    # 26 + 11 tokens, of which the last was never computed: nine full blocks.
    assert cached(second) == 36
    plain = run(twin, request("plain", history, "one", ignore_eos=True))["plain"]
    assert tokens_of(second) == tokens_of(plain)


@pytest.mark.parametrize(
    ("adapter", "tenant"), [("two", "acme"), (None, "acme"), ("one", "other"), (None, "other")]
)
def test_other_versions_and_tenants_find_nothing(
    make: MakeEngine, twin: Engine, adapter: str | None, tenant: str
) -> None:
    engine = make()
    run(engine, replace(request("mine", PROMPT, "one"), tenant="acme"))
    theirs = run(engine, replace(request("r", PROMPT, adapter, ignore_eos=True), tenant=tenant))["r"]
    assert cached(theirs) == 0
    assert tokens_of(theirs) == tokens_of(run(twin, request("r", PROMPT, adapter, ignore_eos=True))["r"])
    assert cached(run(engine, replace(request("again", PROMPT, "one"), tenant="acme"))["again"]) == 24


def test_the_sequences_of_a_request_share_its_prompt(make: MakeEngine, twin: Engine) -> None:
    sampling: dict[str, Any] = {"n": 5, "temperature": 1.0, "seed": 3, "max_tokens": 9, "ignore_eos": True}
    engine = make()
    engine.add(request("r", PROMPT, "one", **sampling))
    while not engine.can_progress:
        pass
    events = engine.step()
    assert {event.index for event in events} == {0}
    events += engine.step()
    assert {event.index for event in events} == set(range(5))
    # Six full blocks once, and for each sequence its own seventh.
    assert engine._blocks.num_live == 6 + 5
    events += run_all(engine)["r"]
    plain = run(twin, request("r", PROMPT, "one", **sampling))["r"]
    for index in range(5):
        assert tokens_of(events, index) == tokens_of(plain, index)
    assert {event.cached_tokens for event in events} == {0}
    assert engine.stats().prefix_hit_tokens == 4 * 24


def test_a_request_for_prompt_logprobs_computes_its_prompt(make: MakeEngine, twin: Engine) -> None:
    engine = make()
    run(engine, request("warm", PROMPT, "one"))
    scored = run(engine, request("r", PROMPT, "one", n=2, prompt_logprobs=1, max_tokens=3))["r"]
    plain = run(twin, request("r", PROMPT, "one", n=2, prompt_logprobs=1, max_tokens=3))["r"]
    first = next(event.prompt_logprobs for event in scored if event.prompt_logprobs is not None)
    expected = next(event.prompt_logprobs for event in plain if event.prompt_logprobs is not None)
    assert [item.token_id for item in first] == PROMPT[1:]
    assert [item.logprob for item in first] == pytest.approx([item.logprob for item in expected], abs=1e-4)
    assert cached(scored) == 0


def test_an_embedding_computes_its_prompt(make: MakeEngine, twin: Engine) -> None:
    engine = make()
    run(engine, request("warm", PROMPT, "one"))
    wanted = replace(request("r", PROMPT, "one", max_tokens=0), embeds=True)
    embedding = run(engine, wanted)["r"][-1].embedding
    assert embedding == pytest.approx(run(twin, wanted)["r"][-1].embedding, abs=1e-4)


def test_a_preempted_sequence_finds_what_it_had_computed(make: MakeEngine, twin: Engine) -> None:
    def requests() -> list[Request]:
        return [request(f"r{n}", [30 + n] * 9, "one", max_tokens=23, ignore_eos=True) for n in range(4)]

    engine = make(kv_bytes=20 * BLOCK_BYTES, max_model_len=32)
    events = run(engine, *requests())
    plain = run(twin, *requests())
    assert engine.stats().preemptions > 0
    assert {name: tokens_of(each) for name, each in events.items()} == {
        name: tokens_of(each) for name, each in plain.items()
    }
    assert {cached(each) for each in events.values()} == {0}


CONVERSATIONS = st.lists(
    st.tuples(
        st.sampled_from([None, "one", "two"]),
        st.sampled_from(["acme", "other"]),
        # Few beginnings, so that they meet again; lengths on both sides of the blocks' edges.
        st.integers(0, 2),
        st.integers(1, 22),
        st.integers(1, 6),
        st.integers(1, 3),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=12,
)
numbers = itertools.count()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations=CONVERSATIONS)
def test_any_traffic_says_what_it_says_without_the_cache(
    small: Engine, twin: Engine, conversations: list[tuple[str | None, str, int, int, int, int, int]]
) -> None:
    requests = [
        replace(
            request(
                f"r{next(numbers)}",
                [40 + start] * (length - length // 2) + [60] * (length // 2),
                adapter,
                max_tokens=output,
                ignore_eos=True,
                n=n,
                temperature=0.9,
                seed=n + length,
            ),
            tenant=tenant,
        )
        for adapter, tenant, start, length, output, n, _ in conversations
    ]
    events: dict[str, list[TokenEvent]] = {}
    for one, (*_, pause) in zip(requests, conversations, strict=True):
        small.add(one)
        for _ in range(pause):
            for event in small.step():
                events.setdefault(event.request_id, []).append(event)
    for name, rest in run_all(small).items():
        events.setdefault(name, []).extend(rest)
    plain = run(twin, *requests)
    for one in requests:
        for index in range(one.sampling.n):
            assert tokens_of(events[one.id], index) == tokens_of(plain[one.id], index)
    pool = small._blocks
    assert pool.num_live == 0
    assert pool.num_free + pool.num_idle == pool.num_blocks
    assert all((entry.leases, entry.pins) == (0, 0) for entry in small.adapters.residency())


@pytest.fixture(scope="module")
def small(make: MakeEngine) -> Engine:
    """An engine whose pages, places and steps are scarce: prompts are chunked and sequences preempted."""
    return make(kv_bytes=16 * BLOCK_BYTES, max_model_len=32, max_num_seqs=5, max_batch_tokens=9)


def test_pages_and_adapters_lend_each_other_what_is_idle(base: Path, tmp_path: Path) -> None:
    names = [f"a{number}" for number in range(6)]
    folders = {
        name: make_peft_adapter(base, tmp_path / name, r=32, targets=ALL_LINEAR_TARGETS, seed=seed)
        for seed, name in enumerate(names)
    }
    # An extent is 128 blocks: the KV cache's own share is one, and it may have four.
    engine = make_engine(
        base,
        tmp_path / "cache",
        FolderFetcher(folders),
        kv_bytes=128 * BLOCK_BYTES,
        adapter_device_bytes=3 * 128 * BLOCK_BYTES,
        device_own_share=0.0,
    )
    budget = engine._blocks._budget
    prompts = [[30 + number] * 60 for number in range(16)]
    long = [request(f"r{n}", p, max_tokens=20, ignore_eos=True) for n, p in enumerate(prompts)]
    expected = {name: tokens_of(events) for name, events in run(engine, *long).items()}
    assert engine.stats().preemptions == 0
    assert budget.kv_used_bytes == 3 * 128 * BLOCK_BYTES
    together = run(engine, *(request(name, PROMPT, name, ignore_eos=True) for name in names))
    assert {len(tokens_of(events)) for events in together.values()} == {16}
    assert budget.kv_used_bytes < 3 * 128 * BLOCK_BYTES
    assert budget.adapter_used_bytes > 128 * BLOCK_BYTES
    assert budget.kv_used_bytes + budget.adapter_used_bytes <= budget.total_bytes
    again = run(engine, *long)
    assert {name: tokens_of(events) for name, events in again.items()} == expected
    assert budget.kv_used_bytes + budget.adapter_used_bytes <= budget.total_bytes
    engine.adapters.close()
