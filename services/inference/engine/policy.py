"""Whose turn it is: the waiting queue, in the order in which its sequences should be admitted.

`FirstCome` is the plain one. `FairShare` keeps virtual token counters (VTC, arXiv 2401.00588, algorithm 2) at
two levels: whoever has been served least goes first, among tenants and then among one tenant's adapters. A
counter rises by the prompt tokens computed and by twice the tokens produced, and one who comes back is lifted
to the least of those who wait, so that idle time is not saved up. A priority orders the requests of one
tenant only, so that nobody gains on another tenant by it, and only until the lower one has waited for
`ageing_seconds`.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from collections.abc import Sequence as Items
from typing import Generic, Protocol, TypeVar

from services.inference.engine.sequence import Sequence

PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
# The part of a step's tokens that prompts of a tenant with more than its share may take: one over this.
CROWDED_PROMPT_PART = 4

ClientT = TypeVar("ClientT", bound=Hashable)
Lane = tuple[str, str | None, int]


class QueuePolicy(Protocol):
    """The waiting sequences, and the rules that order them."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]: ...

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that has just arrived."""

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence before those it was admitted before."""

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out: it was admitted, or has ended."""

    def offers(self) -> Iterator[Sequence]:
        """Yield every waiting sequence once, whoever is next first. What was yielded last may be removed and
        charged for before the next one is asked for.
        """

    def charge(self, sequence: Sequence, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """Note work done for `sequence`."""

    def prompt_tokens(self, tenant: str, running: Items[Sequence], step_tokens: int) -> int:
        """Return the tokens of prompts in a step, of all tenants, up to which those of `tenant` may join; at
        least one.
        """

    def to_admit(self, candidate: Sequence, running: Iterable[Sequence]) -> Sequence | None:
        """Return the running sequence that should make way for `candidate`, if one should."""

    def to_grow(self, running: Iterable[Sequence]) -> Sequence:
        """Return the running sequence that should make way where those that run need more memory."""


class FirstCome:
    """First come, first served; nobody makes way for a newcomer, and the youngest for the older."""

    def __init__(self) -> None:
        self._queue: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def add(self, sequence: Sequence) -> None:
        """Queue it last."""
        self._queue.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue it first."""
        self._queue.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take it out."""
        self._queue.remove(sequence)

    def offers(self) -> Iterator[Sequence]:
        """Yield in order of arrival."""
        yield from list(self._queue)

    def charge(self, sequence: Sequence, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """Keep no account."""

    def prompt_tokens(self, tenant: str, running: Items[Sequence], step_tokens: int) -> int:
        """Return all of them."""
        return step_tokens

    def to_admit(self, candidate: Sequence, running: Iterable[Sequence]) -> Sequence | None:
        """Return nobody."""
        return None

    def to_grow(self, running: Iterable[Sequence]) -> Sequence:
        """Return the one admitted last."""
        return list(running)[-1]


class VirtualCounters(Generic[ClientT]):
    """How much each client has been served, comparable among those who wait."""

    def __init__(self) -> None:
        self._served: dict[ClientT, float] = {}
        self._waiting: Counter[ClientT] = Counter()
        self._last_to_leave: ClientT | None = None

    def __len__(self) -> int:
        return len(self._served)

    def __getitem__(self, client: ClientT) -> float:
        level = self._served.get(client)
        return self._floor() if level is None else level

    def arrive(self, client: ClientT) -> None:
        """Note one more waiting; a client who had none is lifted to the least of those who had."""
        if not self._waiting[client]:
            self._served[client] = max(self[client], self._floor())
        self._waiting[client] += 1

    def leave(self, client: ClientT) -> None:
        """Note one fewer waiting. The last to leave sets the level for who comes next."""
        self._waiting[client] -= 1
        assert self._waiting[client] >= 0
        if not self._waiting[client]:
            del self._waiting[client]
            if not self._waiting:
                self._last_to_leave = client
                self._forget_the_least_served()

    def charge(self, client: ClientT, amount: float) -> None:
        """Add to a client's counter."""
        self._served[client] = self[client] + amount

    def _floor(self) -> float:
        """Return the level of a newcomer: the least of those who wait, or that of the last who did."""
        waiting = [self._served[client] for client, count in self._waiting.items() if count]
        if waiting:
            return min(waiting)
        return 0.0 if self._last_to_leave is None else self._served[self._last_to_leave]

    def _forget_the_least_served(self) -> None:
        """Who is below the floor is as good as new, so the counters stay few."""
        floor = self._floor()
        self._served = {client: level for client, level in self._served.items() if level >= floor}


class FairShare:
    """The least served first: among tenants, then by priority, then among the tenant's adapters."""

    def __init__(self, *, ageing_seconds: float, clock: Callable[[], float]) -> None:
        self._ageing_seconds = ageing_seconds
        self._clock = clock
        self._lanes: dict[Lane, deque[Sequence]] = {}
        self._tenants: VirtualCounters[str] = VirtualCounters()
        self._adapters: dict[str, VirtualCounters[str | None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for lane in self._lanes.values() for sequence in lane)

    def add(self, sequence: Sequence) -> None:
        """Queue it behind the others of its tenant, adapter and priority."""
        self._arrive(sequence)
        self._lanes.setdefault(_lane(sequence), deque()).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue it before the others of its tenant, adapter and priority."""
        self._arrive(sequence)
        self._lanes.setdefault(_lane(sequence), deque()).appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take it out."""
        lane = self._lanes[_lane(sequence)]
        lane.remove(sequence)
        if not lane:
            del self._lanes[_lane(sequence)]
        request = sequence.request
        self._tenants.leave(request.tenant)
        self._adapters[request.tenant].leave(request.adapter_digest)

    def offers(self) -> Iterator[Sequence]:
        """Yield by rank. Ranks only rise meanwhile, so an outdated one is found when it comes up."""
        now = self._clock()
        top = self._top_priorities()
        lanes = [iter(list(lane)) for lane in self._lanes.values()]
        heads = [(next(lane), lane) for lane in lanes]
        heap = [(self._rank(head, top, now), order) for order, (head, _) in enumerate(heads)]
        heapq.heapify(heap)
        while heap:
            rank, order = heap[0]
            head, lane = heads[order]
            true_rank = self._rank(head, top, now)
            if true_rank != rank:
                heapq.heapreplace(heap, (true_rank, order))
                continue
            yield head
            following = next(lane, None)
            if following is None:
                heapq.heappop(heap)
            else:
                heads[order] = (following, lane)
                heapq.heapreplace(heap, (self._rank(following, top, now), order))

    def charge(self, sequence: Sequence, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """Raise the counters of its tenant and of its adapter."""
        amount = PROMPT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens
        request = sequence.request
        self._tenants.charge(request.tenant, amount)
        self._adapters[request.tenant].charge(request.adapter_digest, amount)

    def prompt_tokens(self, tenant: str, running: Items[Sequence], step_tokens: int) -> int:
        """Return all of them, but only a part where the tenant runs more than an even share beside others:
        whoever comes meanwhile waits for the end of the step, and a crowd's prompts would make it long.
        """
        tenants = {sequence.request.tenant for sequence in running} | {lane[0] for lane in self._lanes}
        runs = sum(sequence.request.tenant == tenant for sequence in running)
        if runs * len(tenants) <= len(running):
            return step_tokens
        return max(1, step_tokens // CROWDED_PROMPT_PART)

    def to_admit(self, candidate: Sequence, running: Iterable[Sequence]) -> Sequence | None:
        """Return the youngest of the tenant that runs most, where that evens out how many each runs."""
        mine = candidate.request.tenant
        counts = Counter(sequence.request.tenant for sequence in running)
        theirs, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
        if most < counts[mine] + 2 or self._tenants[mine] > self._tenants[theirs]:
            return None
        return _youngest(running, theirs)

    def to_grow(self, running: Iterable[Sequence]) -> Sequence:
        """Return the youngest of the tenant that runs most; of equals, the one with the youngest."""
        counts = Counter(sequence.request.tenant for sequence in running)
        most = max(counts.values())
        return [sequence for sequence in running if counts[sequence.request.tenant] == most][-1]

    def _arrive(self, sequence: Sequence) -> None:
        request = sequence.request
        self._tenants.arrive(request.tenant)
        self._adapters.setdefault(request.tenant, VirtualCounters()).arrive(request.adapter_digest)

    def _top_priorities(self) -> dict[str, int]:
        top: dict[str, int] = {}
        for tenant, _, priority in self._lanes:
            top[tenant] = max(priority, top.get(tenant, priority))
        return top

    def _rank(self, sequence: Sequence, top: dict[str, int], now: float) -> tuple[float, int, float, int]:
        """Return its place: tenant's counter, priority (of an overdue one: the tenant's highest), adapter's
        counter, arrival.
        """
        request = sequence.request
        is_overdue = now - sequence.queued_at > self._ageing_seconds
        priority = top[request.tenant] if is_overdue else request.priority
        counter = self._adapters[request.tenant][request.adapter_digest]
        return (self._tenants[request.tenant], -priority, counter, sequence.arrival)


def _lane(sequence: Sequence) -> Lane:
    return (sequence.request.tenant, sequence.request.adapter_digest, sequence.request.priority)


def _youngest(running: Iterable[Sequence], tenant: str) -> Sequence:
    return [sequence for sequence in running if sequence.request.tenant == tenant][-1]
