"""Whatever comes in whatever order: memory is counted, no shared block is written, all is given back."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.inference.adapters.device_budget import DeviceBudget
from services.inference.adapters.lease import Lease
from services.inference.engine.blocks import BlockPool
from services.inference.engine.policy import FairShare, FirstCome
from services.inference.engine.request import Request, SamplingParams
from services.inference.engine.scheduler import Scheduler
from services.inference.engine.sequence import Phase, Sequence
from services.inference.engine.text import TextStream
from tests.support.engines import PlainPages

NO_TEXT: defaultdict[int, bytes] = defaultdict(bytes)
BLOCK_SIZE = 4
ADAPTER_BYTES = {"small": 2, "large": 7}
# Nobody alone may need more than the nominal shares.
KV_BYTES, SHARE_OF_ADAPTERS = 12, 8
MAX_TOKENS = 40


class Adapters:
    """The adapters' side of the budget: resident while pinned, and then until their room is wanted."""

    def __init__(self, budget: DeviceBudget) -> None:
        self.budget = budget
        self.pins: Counter[str] = Counter()
        self.resident: set[str] = set()
        self.leases = 0
        budget.adapters = self

    def idle(self) -> list[str]:
        return sorted(name for name in self.resident if not self.pins[name])

    def idle_bytes(self) -> int:
        return sum(ADAPTER_BYTES[name] for name in self.idle())

    def idle_worth(self) -> float | None:
        return 0.01 if self.idle() else None

    def free_idle(self) -> bool:
        for name in self.idle()[:1]:
            self.resident.remove(name)
            self.budget.give_back_adapters(ADAPTER_BYTES[name])
            return True
        return False


class Hold:
    """A lease on one adapter, which becomes ready when told to."""

    def __init__(self, adapters: Adapters, name: str) -> None:
        self.adapters = adapters
        self.name = name
        self.ready = False
        self.error = None
        adapters.leases += 1

    def pin(self) -> object | None:
        assert self.ready
        size_bytes = ADAPTER_BYTES[self.name]
        if self.name not in self.adapters.resident:
            budget = self.adapters.budget
            if not (budget.make_room_for_adapters(size_bytes) and budget.take_adapters(size_bytes)):
                return None
            self.adapters.resident.add(self.name)
        self.adapters.pins[self.name] += 1
        return object()

    def unpin(self) -> None:
        self.adapters.pins[self.name] -= 1
        assert self.adapters.pins[self.name] >= 0

    def release(self) -> None:
        self.adapters.leases -= 1


class SchedulerStates(RuleBasedStateMachine):
    """The scheduler, its blocks and the budget, driven as the engine drives them."""

    @initialize(
        is_fair=st.booleans(),
        is_caching=st.booleans(),
        own_share=st.sampled_from([0.0, 0.25, 1.0]),
        places=st.integers(1, 4),
        extent_blocks=st.integers(1, 3),
    )
    def build(
        self, is_fair: bool, is_caching: bool, own_share: float, places: int, extent_blocks: int
    ) -> None:
        self.now = 0.0
        self.budget = DeviceBudget(KV_BYTES, SHARE_OF_ADAPTERS, own_share=own_share)
        self.adapters = Adapters(self.budget)
        pages = PlainPages(self.budget.most_kv_bytes, extent_blocks)
        self.pool = BlockPool(pages, BLOCK_SIZE, self.budget, is_caching=is_caching, clock=lambda: self.now)
        self.pool.seconds_per_token = 0.01
        policy = FairShare(ageing_seconds=20.0, clock=lambda: self.now) if is_fair else FirstCome()
        self.scheduler = Scheduler(self.pool, policy, max_batch_tokens=10, max_num_seqs=places)
        self.live: dict[str, list[Sequence]] = {}
        self.holds: list[Hold] = []
        self.count = 0

    @rule(
        tenant=st.sampled_from("ab"),
        adapter=st.sampled_from([None, "small", "large"]),
        prompt=st.integers(1, 30),
        output=st.integers(1, 10),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        is_scored=st.booleans(),
    )
    def add(
        self,
        tenant: str,
        adapter: str | None,
        prompt: int,
        output: int,
        n: int,
        priority: int,
        is_scored: bool,
    ) -> None:
        self.count += 1
        sampling = SamplingParams(max_tokens=output, n=n, prompt_logprobs=0 if is_scored else None)
        request = Request(str(self.count), (5,) * prompt, sampling, adapter, tenant=tenant, priority=priority)
        sequences = [
            Sequence(request, i, 0, output, TextStream(NO_TEXT, (), ()), [5] * prompt, self.now)
            for i in range(n)
        ]
        hold = None if adapter is None else Hold(self.adapters, adapter)
        if hold is not None:
            self.holds.append(hold)
        self.live[request.id] = sequences
        self.scheduler.add(sequences, cast("Lease | None", hold))

    @rule(index=st.integers(0, 5))
    def load(self, index: int) -> None:
        for hold in self.holds[index : index + 1]:
            hold.ready = True

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 20))
    def abort(self, index: int) -> None:
        name = sorted(self.live)[index % len(self.live)]
        for sequence in list(self.live[name]):
            self.finish(sequence)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 20), which=st.integers(0, 2))
    def fail_one(self, index: int, which: int) -> None:
        group = self.live[sorted(self.live)[index % len(self.live)]]
        self.finish(group[which % len(group)])

    @rule(is_failing=st.booleans())
    def step(self, is_failing: bool) -> None:
        self.run_step(is_failing=is_failing)

    def run_step(self, *, is_failing: bool = False) -> int:
        self.now += 1.0
        chunks = self.scheduler.schedule()
        assert sum(chunk.length for chunk in chunks) <= 10
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        written: Counter[int] = Counter()
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.phase is Phase.RUNNING
            assert (sequence.adapter is None) == (sequence.adapter_digest is None)
            end = sequence.num_computed + chunk.length
            assert len(sequence.blocks) >= -(-end // BLOCK_SIZE)
            first, last = sequence.num_computed // BLOCK_SIZE, (end - 1) // BLOCK_SIZE
            written.update(sequence.blocks[first : last + 1])
        held = Counter(block for sequence in self.scheduler.running for block in sequence.blocks)
        # Who writes a block is the only one who has it.
        assert all(held[block] == count == 1 for block, count in written.items())
        if is_failing:
            for chunk in chunks[:1]:
                self.finish(chunk.sequence)
            chunks = chunks[1:]
        self.scheduler.mark_computed(chunks)
        for sequence in [chunk.sequence for chunk in chunks]:
            if sequence.num_pending == 0:
                sequence.append(7)
                self.scheduler.mark_produced(sequence)
                if sequence.num_output == sequence.max_tokens:
                    self.finish(sequence)
        return len(chunks)

    def finish(self, sequence: Sequence) -> None:
        name = sequence.request.id
        self.scheduler.finish(sequence)
        self.live[name].remove(sequence)
        if not self.live[name]:
            del self.live[name]
            self.scheduler.release(name)

    @invariant()
    def memory_is_counted(self) -> None:
        pool, budget = self.pool, self.budget
        running = self.scheduler.running
        assert pool.num_free + pool.num_idle + pool.num_live == pool.num_blocks
        assert pool.num_live == len({block for sequence in running for block in sequence.blocks})
        assert budget.kv_used_bytes + budget.adapter_used_bytes <= budget.total_bytes
        assert budget.kv_used_bytes >= pool.num_live + pool.num_idle
        assert budget.adapter_used_bytes == sum(ADAPTER_BYTES[name] for name in self.adapters.resident)
        pinned = Counter(s.adapter_digest for s in running if s.adapter_digest is not None)
        assert +self.adapters.pins == pinned
        waiting = list(self.scheduler.waiting)
        assert all(not sequence.blocks and sequence.adapter is None for sequence in waiting)
        assert {id(s) for s in [*running, *waiting]} == {id(s) for group in self.live.values() for s in group}

    def teardown(self) -> None:
        if not hasattr(self, "live"):
            return
        for hold in self.holds:
            hold.ready = True
        for _ in range(2000):
            if not self.live:
                break
            assert self.run_step() > 0, "somebody waits, nothing runs, and nobody is admitted"
            self.memory_is_counted()
        assert not self.live
        assert self.pool.num_live == 0
        assert self.adapters.leases == 0
        assert not +self.adapters.pins


SchedulerStates.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedulerStates: Any = pytest.mark.timeout(120)(SchedulerStates.TestCase)
