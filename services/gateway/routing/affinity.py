"""The policy in use: where the adapter is, unless that is too busy."""

from __future__ import annotations

import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Set

from services.gateway.routing.policy import NONE_EXCLUDED, FleetView
from services.gateway.routing.ring import Rings

EPSILON = 0.25
FILL = 0.8
PATIENCE = 2.0
PLACEMENT_SECONDS = 30.0


class AdapterAffinity:
    """Prefers replicas that hold the adapter, and bounds how busy any of them gets.

    A replica takes a request while its load is below max(FILL x slots, ceil((1 + EPSILON) x (m + 1) / n)),
    with m requests on n replicas. The second term is the capacity of consistent hashing with bounded loads
    (Mirrokni, Thorup, Zadimoghaddam 2018, arXiv 1608.01350, section 2); the first lets a batch fill before it
    counts as busy.

    1. Of the replicas that hold the adapter, the least loaded takes the request, if it is below the bound.
    2. While the adapter is only on its way to a replica, its requests wait there, up to `PATIENCE` times the
       bound: a second download would not be sooner, and a crowd on a cold adapter makes one, not many.
    3. Else the request goes to the first replica below the bound, clockwise from the adapter on the ring,
       which then holds it too. So a hot adapter has as many copies as its load needs, and copies that nobody
       asks for end by eviction.

    Placements are remembered for `PLACEMENT_SECONDS`, until the replica tells of the adapter by itself.
    """

    def __init__(self, *, seed: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._clock = clock
        self._rings = Rings()
        self._placed: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._placed_on: dict[str, list[str]] = {}

    def choose(self, adapter: str, fleet: FleetView, excluded: Set[str] = NONE_EXCLUDED) -> str | None:
        """Return the replica for a request; what it decides it remembers."""
        if not adapter:
            return self._lighter_of_two(fleet, excluded)
        self._forget_old()
        bound = math.ceil((1 + EPSILON) * (fleet.outstanding + 1) / max(1, len(fleet.members)))
        holding = fleet.holders(adapter)
        best = _least_loaded(holding, fleet, excluded)
        if best is not None and fleet.load(best) < _limit(fleet, best, bound):
            return best
        # On its way there; what a replica has told of is settled.
        loading = [place for place in self._placed_on.get(adapter, ()) if place not in holding]
        soonest = _least_loaded((place for place in loading if fleet.takes(place)), fleet, excluded)
        patience = PATIENCE if best is None else 1.0
        if soonest is not None and fleet.load(soonest) < patience * _limit(fleet, soonest, bound):
            return soonest
        for replica in self._rings.of(fleet.members).walk(adapter):
            if replica not in excluded and fleet.load(replica) < _limit(fleet, replica, bound):
                self._place(adapter, replica)
                return replica
        return _least_loaded(fleet.members, fleet, excluded)

    def _lighter_of_two(self, fleet: FleetView, excluded: Set[str]) -> str | None:
        """Return the less loaded of two chosen by chance (Mitzenmacher 2001)."""
        members = [replica for replica in fleet.members if replica not in excluded]
        return _least_loaded(self._random.sample(members, min(2, len(members))), fleet, NONE_EXCLUDED)

    def _place(self, adapter: str, replica: str) -> None:
        if (adapter, replica) not in self._placed:
            self._placed_on.setdefault(adapter, []).append(replica)
        self._placed[adapter, replica] = self._clock() + PLACEMENT_SECONDS
        self._placed.move_to_end((adapter, replica))

    def _forget_old(self) -> None:
        now = self._clock()
        while self._placed and next(iter(self._placed.values())) <= now:
            (adapter, replica), _ = self._placed.popitem(last=False)
            self._placed_on[adapter].remove(replica)
            if not self._placed_on[adapter]:
                del self._placed_on[adapter]


def _limit(fleet: FleetView, replica: str, bound: int) -> int:
    return max(bound, math.ceil(FILL * fleet.slots(replica)))


def _least_loaded(replicas: Iterable[str], fleet: FleetView, excluded: Set[str]) -> str | None:
    """Return the first of the least loaded."""
    candidates = [replica for replica in replicas if replica not in excluded]
    return min(candidates, key=fleet.load, default=None)
