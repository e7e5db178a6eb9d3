"""What the routing policies choose, on a fleet whose loads and holdings a test sets."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence

import pytest

from services.gateway.routing.affinity import PLACEMENT_SECONDS, AdapterAffinity
from services.gateway.routing.policy import Policy
from services.gateway.routing.ring import HashRing
from services.gateway.routing.twins import ConsistentHashing, RandomChoice, RoundRobin

SLOTS = 10
BUSY = 8
"""What `FILL` of the slots is."""


class FakeFleet:
    """Loads and holders as a test sets them."""

    def __init__(self, count: int) -> None:
        self.members: Sequence[str] = tuple(f"replica-{number}" for number in range(count))
        self.loads: Counter[str] = Counter()
        self.held: dict[str, list[str]] = {}

    @property
    def outstanding(self) -> int:
        return self.loads.total()

    def takes(self, replica: str) -> bool:
        return replica in self.members

    def load(self, replica: str) -> int:
        return self.loads[replica]

    def slots(self, replica: str) -> int:
        return SLOTS

    def holders(self, adapter: str) -> Collection[str]:
        return self.held.get(adapter, [])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def policies() -> list[Policy]:
    return [AdapterAffinity(seed=1), RandomChoice(1), RoundRobin(), ConsistentHashing()]


@pytest.mark.parametrize("policy", policies(), ids=lambda policy: type(policy).__name__)
def test_excluded_replicas_are_never_chosen(policy: Policy) -> None:
    fleet = FakeFleet(4)
    excluded = {"replica-0", "replica-2"}
    for number in range(200):
        adapter = f"adapter-{number}" if number % 2 else ""
        assert policy.choose(adapter, fleet, excluded) in {"replica-1", "replica-3"}
    assert policy.choose("adapter", fleet, set(fleet.members)) is None
    assert policy.choose("", fleet, set(fleet.members)) is None
    fleet.members = ()
    assert policy.choose("adapter", fleet) is None


def test_the_least_loaded_holder_takes_the_request() -> None:
    fleet, policy = FakeFleet(6), AdapterAffinity(seed=1)
    fleet.held["hot"] = ["replica-1", "replica-4"]
    fleet.loads.update({"replica-1": 3, "replica-4": 2})
    assert policy.choose("hot", fleet) == "replica-4"
    fleet.loads["replica-4"] = 4
    assert policy.choose("hot", fleet) == "replica-1"
    assert policy.choose("hot", fleet, {"replica-1"}) == "replica-4"


def test_busy_holders_spill_to_one_more_copy_and_not_to_many() -> None:
    fleet, policy = FakeFleet(6), AdapterAffinity(seed=1)
    fleet.held["hot"] = ["replica-1"]
    fleet.loads["replica-1"] = BUSY - 1
    assert policy.choose("hot", fleet) == "replica-1"
    fleet.loads["replica-1"] = BUSY
    spilled = policy.choose("hot", fleet)
    assert spilled is not None
    assert spilled != "replica-1"
    for load in range(BUSY):
        fleet.loads[spilled] = load
        assert policy.choose("hot", fleet) == spilled
    fleet.loads[spilled] = BUSY
    assert policy.choose("hot", fleet) not in {"replica-1", spilled}


def test_a_crowd_on_a_cold_adapter_waits_at_one_place() -> None:
    fleet, policy = FakeFleet(20), AdapterAffinity(seed=1)
    chosen = []
    for _ in range(2 * BUSY):
        replica = policy.choose("cold", fleet)
        assert replica is not None
        fleet.loads[replica] += 1
        chosen.append(replica)
    assert len(set(chosen)) == 1
    # But no crowd waits without end while others idle.
    assert policy.choose("cold", fleet) != chosen[0]


def test_a_placement_is_forgotten_when_the_replica_never_tells_of_it() -> None:
    clock = Clock()
    fleet, policy = FakeFleet(8), AdapterAffinity(seed=1, clock=clock)
    home = policy.choose("cold", fleet)
    assert home is not None
    fleet.loads[home] = BUSY
    assert policy.choose("cold", fleet) == home
    clock.now += PLACEMENT_SECONDS
    assert policy.choose("cold", fleet) != home


def test_no_replica_gets_much_more_than_its_share() -> None:
    """Mirrokni et al.: at most ceil((1 + epsilon) m / n), here where that is more than a batch."""
    fleet, policy = FakeFleet(10), AdapterAffinity(seed=1)
    chance = random.Random(3)
    for number in range(2000):
        adapter = f"adapter-{min(int(chance.paretovariate(0.7)), 500)}"
        replica = policy.choose(adapter, fleet)
        assert replica is not None
        fleet.loads[replica] += 1
        if number % 50 == 0:
            fleet.held.setdefault(adapter, []).append(replica)
    # Whoever waits for a cold adapter may exceed the bound by PATIENCE, once.
    assert max(fleet.loads.values()) <= 2 * 1.25 * 2000 / 10
    assert min(fleet.loads[replica] for replica in fleet.members) > 0


def test_base_requests_go_to_the_less_loaded() -> None:
    fleet, policy = FakeFleet(2), AdapterAffinity(seed=1)
    for _ in range(100):
        replica = policy.choose("", fleet)
        assert replica is not None
        fleet.loads[replica] += 1
    assert set(fleet.loads.values()) == {50}


def test_a_replica_that_leaves_moves_only_its_own_adapters() -> None:
    replicas = [f"replica-{number}" for number in range(10)]
    before, after = HashRing(replicas), HashRing(replicas[:-1])
    moved = Counter[str]()
    for number in range(2000):
        home, new = next(before.walk(f"adapter-{number}")), next(after.walk(f"adapter-{number}"))
        moved["moved" if home != new else "stayed"] += 1
        assert home == new or home == "replica-9"
    assert 50 < moved["moved"] < 500
    assert sorted(before.walk("any")) == replicas


def test_plain_twins_do_what_their_names_say() -> None:
    fleet = FakeFleet(3)
    turns, hashing = RoundRobin(), ConsistentHashing()
    assert [turns.choose("", fleet) for _ in range(4)] == [*fleet.members, "replica-0"]
    home = hashing.choose("adapter", fleet)
    fleet.loads[str(home)] = 10_000
    assert hashing.choose("adapter", fleet) == home
