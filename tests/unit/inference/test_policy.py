"""Whose turn it is: fair among tenants and adapters, by priority within a tenant, nobody starved."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence as Items
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.adapters.device_budget import DeviceBudget
from services.inference.engine.blocks import BlockPool
from services.inference.engine.policy import FairShare, FirstCome, QueuePolicy
from services.inference.engine.request import Request, SamplingParams
from services.inference.engine.scheduler import Scheduler
from services.inference.engine.sequence import Sequence
from services.inference.engine.text import TextStream
from tests.support.engines import PlainPages

NO_TEXT: defaultdict[int, bytes] = defaultdict(bytes)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A scheduler without a model: every step computes what is scheduled and produces its tokens."""

    def __init__(
        self, policy: QueuePolicy, clock: Clock, *, places: int = 4, blocks: int = 1000, tokens: int = 64
    ) -> None:
        self.policy = policy
        self.clock = clock
        self.pool = BlockPool(PlainPages(blocks, blocks), 4, DeviceBudget(blocks, 0), clock=clock)
        self.scheduler = Scheduler(self.pool, policy, max_batch_tokens=tokens, max_num_seqs=places)
        self.tokens_of_step = 0
        self._numbers = itertools.count()

    def add(
        self,
        tenant: str,
        *,
        prompt: int = 4,
        output: int = 4,
        adapter: str | None = None,
        priority: int = 0,
    ) -> str:
        number = next(self._numbers)
        request = Request(
            f"{tenant}-{number}",
            # No two prompts alike: what is found computed is not charged for.
            (number, *[7] * (prompt - 1)),
            SamplingParams(max_tokens=output),
            adapter,
            tenant=tenant,
            priority=priority,
        )
        text = TextStream(NO_TEXT, request.prompt_token_ids, ())
        sequence = Sequence(request, 0, 0, output, text, list(request.prompt_token_ids), self.clock.now)
        self.scheduler.add([sequence], None)
        return request.id

    def step(self) -> list[str]:
        """Run a step; return the ids of the requests it finished."""
        self.clock.now += 1.0
        chunks = self.scheduler.schedule()
        self.tokens_of_step = sum(chunk.length for chunk in chunks)
        self.scheduler.mark_computed(chunks)
        finished = []
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.num_pending == 0:
                sequence.append(9)
                self.scheduler.mark_produced(sequence)
            if sequence.num_output == sequence.max_tokens:
                self.scheduler.finish(sequence)
                self.scheduler.release(sequence.request.id)
                finished.append(sequence.request.id)
        return finished

    def crowds(self) -> set[str]:
        """Return the tenants whose prompts may not have the whole of the next step."""
        running = list(self.scheduler.running)
        tenants = {sequence.request.tenant for sequence in [*running, *self.policy]}
        return {tenant for tenant in tenants if self.policy.prompt_tokens(tenant, running, 8) < 8}

    def run(self, limit: int = 10_000) -> list[str]:
        """Run until nothing is left; return the ids in the order in which they finished."""
        finished: list[str] = []
        for _ in range(limit):
            if not (self.scheduler.running or len(self.policy)):
                return finished
            finished += self.step()
        raise AssertionError("it does not come to an end")


def fair(places: int = 4, ageing_seconds: float = 1e9, **limits: int) -> Bench:
    clock = Clock()
    return Bench(FairShare(ageing_seconds=ageing_seconds, clock=clock), clock, places=places, **limits)


def first_come(places: int = 4, **limits: int) -> Bench:
    return Bench(FirstCome(), Clock(), places=places, **limits)


def test_a_step_without_prompts_asks_for_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = fair(places=4)
    for tenant in "abcd":
        bench.add(tenant)
    bench.step()
    asked: list[str] = []
    ask = FairShare.prompt_tokens

    def asking(policy: FairShare, tenant: str, *others: Any) -> int:
        asked.append(tenant)
        return ask(policy, tenant, *others)

    monkeypatch.setattr(FairShare, "prompt_tokens", asking)
    before = [sequence.num_output for sequence in bench.scheduler.running]
    bench.step()
    assert len(before) == 4
    assert asked == []
    bench.add("e")
    bench.run()
    assert set(asked) == {"e"}


def test_first_come_is_first_served() -> None:
    bench = first_come(places=1)
    ids = [bench.add(tenant, priority=priority) for tenant, priority in [("a", 0), ("b", 9), ("a", -9)]]
    assert bench.run() == ids


def test_a_flood_does_not_hold_up_another_tenant() -> None:
    finished = {}
    for bench in (fair(places=2), first_come(places=2)):
        for _ in range(20):
            bench.add("flood")
        bench.step()
        quiet = bench.add("quiet")
        finished[type(bench.policy)] = bench.run().index(quiet)
    assert finished[FairShare] <= 2
    assert finished[FirstCome] == 20


def test_a_newcomer_gets_a_place_from_the_tenant_that_has_most() -> None:
    bench = fair(places=4)
    for _ in range(4):
        bench.add("flood", output=50)
    bench.step()
    quiet = bench.add("quiet")
    bench.step()
    assert quiet in {sequence.request.id for sequence in bench.scheduler.running}
    assert bench.scheduler.num_preemptions == 1
    assert len(bench.run()) == 5


def test_a_second_request_of_one_tenant_takes_no_place_from_the_first() -> None:
    bench = fair(places=2)
    ids = [bench.add("only", adapter=name, output=10) for name in ("x", "x", "y")]
    assert sorted(bench.run()) == ids
    assert bench.scheduler.num_preemptions == 0


def test_adapters_of_one_tenant_share_too() -> None:
    bench = fair(places=1)
    for _ in range(6):
        bench.add("t", adapter="busy")
    bench.step()
    bench.add("t", adapter="calm")
    assert [name.startswith("t-6") for name in bench.run()].index(True) == 1


def test_many_adapters_are_no_way_to_a_larger_share() -> None:
    bench = fair(places=1)
    for number in range(12):
        bench.add("many", adapter=str(number))
        bench.add("one", adapter="x")
    order = [name.split("-")[0] for name in bench.run()]
    assert abs(order[:12].count("many") - order[:12].count("one")) <= 1


def test_priority_orders_the_requests_of_a_tenant_and_of_no_other() -> None:
    bench = fair(places=1)
    blocker = bench.add("a")
    bench.step()
    low, high = bench.add("a", priority=-5), bench.add("a", priority=5)
    other = bench.add("b")
    assert bench.run() == [blocker, other, high, low]


def test_ageing_ends_the_advantage_of_a_priority() -> None:
    orders = []
    for ageing_seconds in (1e9, 10.0):
        bench = fair(places=1, ageing_seconds=ageing_seconds)
        low = bench.add("a", priority=-1)
        for _ in range(10):
            bench.add("a", priority=1)
        orders.append(bench.run().index(low))
    assert orders[0] == 10
    assert orders[1] <= 4


def test_a_flood_that_has_aged_does_not_pass_a_newcomer() -> None:
    bench = fair(places=1, ageing_seconds=5.0)
    for _ in range(20):
        bench.add("flood", priority=100)
    for _ in range(30):
        bench.step()
    quiet = bench.add("quiet")
    assert bench.run().index(quiet) <= 1


def test_idle_time_is_not_saved_up() -> None:
    bench = fair(places=1)
    bench.add("late")
    bench.run()
    for _ in range(30):
        bench.add("busy")
    for _ in range(100):
        bench.step()
    for _ in range(10):
        bench.add("late")
    order = [name.split("-")[0] for name in bench.run()]
    assert order[:8].count("late") in (3, 4, 5)


def test_counters_of_those_who_left_are_forgotten() -> None:
    policy = FairShare(ageing_seconds=1.0, clock=Clock())
    bench = Bench(policy, Clock(), places=2)
    for number in range(300):
        bench.add(f"tenant-{number}")
        bench.run()
    assert len(policy._tenants) < 10


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from([None, "x", "y"]),
        st.integers(1, 30),
        st.integers(1, 12),
        st.integers(-2, 2),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=25,
)


@given(requests=REQUESTS, places=st.integers(1, 4), blocks=st.integers(11, 40), is_fair=st.booleans())
def test_everybody_is_served_whatever_has_to_make_way(
    requests: Items[tuple[str, str | None, int, int, int, int]], places: int, blocks: int, is_fair: bool
) -> None:
    make = fair if is_fair else first_come
    bench = make(places=places, blocks=blocks, tokens=8)
    names = set()
    finished: list[str] = []
    for tenant, adapter, prompt, output, priority, pause in requests:
        names.add(bench.add(tenant, prompt=prompt, output=output, adapter=adapter, priority=priority))
        for _ in range(pause):
            finished += bench.step()
            assert bench.pool.num_free + bench.pool.num_idle + bench.pool.num_live == blocks
    assert sorted(finished + bench.run()) == sorted(names)
    assert bench.pool.num_live == 0


@given(requests=REQUESTS, places=st.integers(1, 4), is_fair=st.booleans())
def test_no_place_stays_empty_while_somebody_waits(
    requests: Items[tuple[str, str | None, int, int, int, int]], places: int, is_fair: bool
) -> None:
    """But for those of a crowd, whose prompts have only a part of each step."""
    bench = (fair if is_fair else first_come)(places=places, tokens=8)
    for tenant, adapter, prompt, output, priority, pause in requests:
        bench.add(tenant, prompt=prompt, output=output, adapter=adapter, priority=priority)
        for _ in range(pause):
            crowds = bench.crowds()
            finished = bench.step()
            is_full = bench.tokens_of_step == 8 or len(bench.scheduler.running) + len(finished) == places
            assert is_full or {waiting.request.tenant for waiting in bench.policy} <= crowds


def test_prompts_of_a_crowd_leave_steps_short_for_others() -> None:
    bench = fair(places=16, tokens=64)
    for _ in range(16):
        bench.add("flood", prompt=16, output=40)
    steps = []
    for number in range(5):
        if number == 2:
            bench.add("quiet", prompt=16, output=40)
        running = len(bench.scheduler.running)
        bench.step()
        steps.append(bench.tokens_of_step - running)
    # Alone it has the whole of each step; beside another what that one's prompt leaves of a quarter.
    assert steps[:2] == [64, 60]
    assert all(0 < step <= 16 + 4 for step in steps[2:])
    assert bench.scheduler.num_preemptions == 0
    assert len(bench.run()) == 17


def test_a_long_prompt_of_one_who_runs_little_has_the_whole_step() -> None:
    bench = fair(places=16, tokens=64)
    for _ in range(4):
        bench.add("flood", prompt=16, output=40)
    bench.step()
    bench.add("quiet", prompt=100, output=4)
    for _ in range(4):
        bench.add("flood", prompt=16, output=40)
    bench.step()
    assert bench.tokens_of_step == 64
    assert len(bench.scheduler.running) == 5


@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=2),
    places=st.integers(1, 4),
    steps=st.integers(10, 120),
)
def test_two_who_always_wait_are_served_alike(sizes: list[tuple[int, int]], places: int, steps: int) -> None:
    """VTC's bound (arXiv 2401.00588, theorem 4.4): served tokens differ by at most twice the largest of one
    prompt and of all that is being produced.
    """
    bench = fair(places=places)
    for tenant, (prompt, output) in zip("ab", sizes, strict=True):
        for _ in range(steps * places + 1):
            bench.add(tenant, prompt=prompt, output=output)
    for _ in range(steps):
        bench.step()
    tenants = bench.policy._tenants  # type: ignore[attr-defined]
    largest_prompt = max(prompt for prompt, _ in sizes)
    produced = 2.0 * places * max(output for _, output in sizes)
    assert abs(tenants["a"] - tenants["b"]) <= 2 * max(largest_prompt, produced)


def test_a_preempted_sequence_waits_at_the_head_of_its_lane() -> None:
    for bench in (fair(places=2, blocks=8), first_come(places=2, blocks=8)):
        first = bench.add("a", prompt=12, output=8)
        second = bench.add("a", prompt=12, output=8)
        third = bench.add("a", prompt=12, output=8)
        assert bench.run() == [first, second, third]
        assert bench.scheduler.num_preemptions > 0
