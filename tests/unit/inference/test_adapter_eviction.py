"""Who makes room: the policy against its plain twin on a trace, and what it must never forget or keep."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from services.inference.adapters.demand import DemandHistory
from services.inference.adapters.eviction import (
    Candidate,
    Worth,
    choose_victims,
    last_use,
    reload_cost_per_byte,
)

MIB = 1 << 20


def candidate(name: str, **changes: float) -> Candidate:
    fields = {"size_bytes": 10, "demand": 1.0, "reload_cost": 1.0, "last_use_at": 0.0} | changes
    return Candidate(name, **fields)  # type: ignore[arg-type]


def test_victims_are_those_of_least_worth_and_no_more_than_needed() -> None:
    candidates = [candidate("hot", demand=9.0), candidate("cold", demand=1.0), candidate("warm", demand=3.0)]
    assert choose_victims(candidates, 10) == ["cold"]
    assert choose_victims(candidates, 11) == ["cold", "warm"]
    assert choose_victims(candidates, 0) == []
    assert choose_victims(candidates, 31) is None


@pytest.mark.parametrize(
    ("changes", "goes"),
    [
        ({"demand": 0.5}, True),
        ({"reload_cost": 0.5}, True),
        ({"size_bytes": 20}, True),
        ({"demand": 2.0, "size_bytes": 15}, False),
        ({"last_use_at": -100.0}, False),
    ],
)
def test_worth_is_demand_times_reload_cost_per_byte(changes: dict[str, float], goes: bool) -> None:
    victims = choose_victims([candidate("other"), candidate("this", **changes)], 1)
    assert victims == (["this"] if goes else ["other"])


@dataclass
class Host:
    """A host tier on a trace: it counts the bytes that it had to load."""

    budget_bytes: int
    sizes: dict[str, int]
    worth: Worth
    half_life_seconds: float = 300.0
    loaded_bytes: int = 0
    held: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.history = DemandHistory(self.half_life_seconds)

    def ask(self, name: str, now: float) -> None:
        self.history.of(name).add(now)
        if name not in self.held:
            used = sum(self.sizes[other] for other in self.held)
            candidates = [
                # What the disk has is read at one rate: the cost of a reload goes with the bytes.
                Candidate(other, self.sizes[other], self.history.of(other).at(now), self.sizes[other], at)
                for other, at in self.held.items()
            ]
            victims = choose_victims(candidates, used + self.sizes[name] - self.budget_bytes, self.worth)
            assert victims is not None
            for victim in victims:
                del self.held[victim]
            self.loaded_bytes += self.sizes[name]
        self.held[name] = now
        assert sum(self.sizes[other] for other in self.held) <= self.budget_bytes


def zipf_trace(count: int, *, shift_at: int | None = None) -> Iterator[str]:
    """Yield names by Zipf's law; from request `shift_at` on, other names are the popular ones."""
    draw = random.Random(5)
    weights = [1 / (rank + 1) for rank in range(300)]
    for number, rank in enumerate(draw.choices(range(300), weights, k=count)):
        moved = 150 if shift_at is not None and number >= shift_at else 0
        yield f"a{(rank + moved) % 300}"


def sizes() -> dict[str, int]:
    draw = random.Random(6)
    return {f"a{number}": draw.choice([1, 2, 4, 8]) * MIB for number in range(300)}


def run(worth: Worth, trace: Iterator[str]) -> int:
    host = Host(200 * MIB, sizes(), worth)
    for number, name in enumerate(trace):
        host.ask(name, number * 0.1)
    return host.loaded_bytes


def test_on_a_zipf_trace_fewer_bytes_are_reloaded_than_by_least_recent_use() -> None:
    ours, plain = (run(worth, zipf_trace(6000)) for worth in (reload_cost_per_byte, last_use))
    assert ours < 0.85 * plain, (ours, plain)


def test_what_was_popular_once_does_not_stay_for_ever() -> None:
    ours, plain = (run(worth, zipf_trace(12000, shift_at=6000)) for worth in (reload_cost_per_byte, last_use))
    assert ours < 0.95 * plain, (ours, plain)


def test_demand_outlives_an_eviction_and_is_bounded() -> None:
    history = DemandHistory(10.0, limit=2)
    history.of("a").add(0.0)
    history.of("a").add(0.0)
    assert history.of("a").at(10.0) == pytest.approx(1.0)
    history.of("b")
    history.of("a")
    history.of("c")
    assert history.of("a").at(0.0) == pytest.approx(2.0)
    assert history.of("b").at(0.0) == 0.0
