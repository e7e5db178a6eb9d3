"""Four routing policies over the same traffic: who finds the adapter in memory, and who waits.

A simulation in simulated time of a fleet of replicas behind one router. Adapters are asked for by Zipf's law.
A replica runs so many requests at once, keeps so many adapters by recency, and loads one that it lacks while
other requests go on; loads of one adapter are shared, and any number go on at once, which flatters policies
that miss often. Requests arrive by a Poisson process and run for an exponential time. The router knows its
own requests at once and what replicas hold a quarter of a second late, as in service. The policies are the
gateway's own classes. Figures are of the requests behind the warm-up, and the same for the same seed, but for
those of this machine's time. The last line is JSON.

    python -m bench.routing_simulation
"""

from __future__ import annotations

import argparse
import heapq
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from services.gateway.routing.affinity import AdapterAffinity
from services.gateway.routing.policy import Policy
from services.gateway.routing.twins import ConsistentHashing, RandomChoice, RoundRobin

NO_HOLDERS: Mapping[str, None] = {}
PolicyOnClock = Callable[[Callable[[], float]], Policy]


@dataclass(slots=True)
class Traffic:
    """When requests come, for which adapters, and how long each runs."""

    arrival_seconds: Sequence[float]
    adapters: Sequence[int]
    run_seconds: Sequence[float]


@dataclass(slots=True)
class SimulatedReplica:
    """One replica: its batch, its queue, and the adapters in its memory, oldest first."""

    load: int = 0
    running: int = 0
    ready: deque[int] = field(default_factory=deque)
    cached: OrderedDict[str, bool] = field(default_factory=OrderedDict)
    waiting: dict[str, list[int]] = field(default_factory=dict)
    load_seconds: float = 0.0
    changed_at: float = 0.0

    def change(self, by: int, now: float) -> None:
        """Change the number of requests that run or wait here."""
        self.load_seconds += self.load * (now - self.changed_at)
        self.changed_at = now
        self.load += by


class Simulation:
    """One policy over one traffic; it is also the policy's view of the fleet."""

    def __init__(self, options: argparse.Namespace, traffic: Traffic, make: PolicyOnClock) -> None:
        self._options = options
        self._traffic = traffic
        self._policy = make(lambda: self.now)
        self._replicas = {f"replica-{number:04}": SimulatedReplica() for number in range(options.replicas)}
        self._known: dict[str, dict[str, None]] = {}
        self._events: list[tuple[float, int, str, str, str, int]] = []
        self._order = 0
        self.members = tuple(self._replicas)
        self.outstanding = 0
        self.now = 0.0
        self._waits = np.zeros(len(traffic.adapters))
        self.hits = 0

    def takes(self, replica: str) -> bool:
        """Nobody leaves."""
        return True

    def load(self, replica: str) -> int:
        """Return how many requests run or wait there."""
        return self._replicas[replica].load

    def slots(self, replica: str) -> int:
        """Return how many requests run there at once."""
        return int(self._options.slots)

    def holders(self, adapter: str) -> Collection[str]:
        """Return the replicas that are known to hold the adapter."""
        return self._known.get(adapter, NO_HOLDERS)

    def run(self) -> dict[str, Any]:
        """Let all requests come and end; return the figures."""
        started = time.perf_counter()
        choosing_seconds = 0.0
        for number, arrival in enumerate(self._traffic.arrival_seconds):
            self._until(arrival)
            if number == self._options.warm_up:
                self._begin_counting()
            adapter = f"adapter-{self._traffic.adapters[number]}"
            before = time.perf_counter()
            replica = self._policy.choose(adapter, self)
            choosing_seconds += time.perf_counter() - before
            assert replica is not None, "nobody is excluded"
            self._arrive(number, adapter, replica)
        self._until(self.now)
        end = self.now
        for one in self._replicas.values():
            one.change(0, end)
        self._until(float("inf"))
        return self._figures(choosing_seconds, time.perf_counter() - started)

    def _begin_counting(self) -> None:
        self.hits = 0
        for replica in self._replicas.values():
            replica.change(0, self.now)
            replica.load_seconds = 0.0

    def _figures(self, choosing_seconds: float, wall_seconds: float) -> dict[str, Any]:
        counted = len(self._traffic.adapters) - self._options.warm_up
        waits = self._waits[self._options.warm_up :]
        loads = np.array([replica.load_seconds for replica in self._replicas.values()])
        return {
            "hit_rate": round(self.hits / counted, 4),
            "load_skew_max_over_mean": round(float(loads.max() / loads.mean()), 2),
            "load_skew_p99_over_mean": round(float(np.quantile(loads, 0.99) / loads.mean()), 2),
            "wait_p50_seconds": round(float(np.quantile(waits, 0.5)), 4),
            "wait_p99_seconds": round(float(np.quantile(waits, 0.99)), 4),
            "wait_mean_seconds": round(float(waits.mean()), 4),
            "choose_microseconds": round(1e6 * choosing_seconds / len(self._traffic.adapters), 1),
            "wall_seconds": round(wall_seconds, 1),
        }

    def _arrive(self, number: int, adapter: str, name: str) -> None:
        replica = self._replicas[name]
        replica.change(1, self.now)
        self.outstanding += 1
        is_loaded = replica.cached.get(adapter)
        if is_loaded:
            self.hits += 1
            replica.ready.append(number)
            self._start(name)
        elif adapter in replica.waiting:
            replica.waiting[adapter].append(number)
        else:
            replica.waiting[adapter] = [number]
            self._at(self.now + self._options.adapter_seconds, "loaded", name, adapter, number)
        if adapter in replica.cached:
            replica.cached.move_to_end(adapter)

    def _start(self, name: str) -> None:
        replica = self._replicas[name]
        while replica.ready and replica.running < self._options.slots:
            number = replica.ready.popleft()
            replica.running += 1
            self._waits[number] = self.now - self._traffic.arrival_seconds[number]
            self._at(self.now + self._traffic.run_seconds[number], "ended", name, "", number)

    def _until(self, end: float) -> None:
        """Let everything happen that happens before `end`."""
        while self._events and self._events[0][0] <= end:
            self.now, _, kind, name, adapter, _ = heapq.heappop(self._events)
            self._happen(kind, name, adapter)
        if end != float("inf"):
            self.now = end

    def _happen(self, kind: str, name: str, adapter: str) -> None:
        replica = self._replicas[name]
        match kind:
            case "ended":
                replica.change(-1, self.now)
                replica.running -= 1
                self.outstanding -= 1
                self._start(name)
            case "loaded":
                replica.cached[adapter] = True
                replica.ready.extend(replica.waiting.pop(adapter))
                self._tell(name, adapter)
                if len(replica.cached) > self._options.memory:
                    evicted, _ = replica.cached.popitem(last=False)
                    self._tell(name, evicted)
                self._start(name)
            case "told":
                if adapter in replica.cached:
                    self._known.setdefault(adapter, {})[name] = None
                else:
                    self._known.get(adapter, {}).pop(name, None)

    def _tell(self, name: str, adapter: str) -> None:
        self._at(self.now + self._options.told_seconds, "told", name, adapter, 0)

    def _at(self, moment: float, kind: str, name: str, adapter: str, number: int) -> None:
        self._order += 1
        heapq.heappush(self._events, (moment, self._order, kind, name, adapter, number))


def main() -> None:
    """Run every policy over the same traffic and print what each gave."""
    options = parse_options()
    traffic = make_traffic(options)
    results = {}
    for name, make in policies(options.seed).items():
        results[name] = Simulation(options, traffic, make).run()
        print(f"{name:20} {results[name]}", flush=True)
    print(json.dumps({"bench": "routing_simulation", "settings": vars(options), "policies": results}))


def policies(seed: int) -> dict[str, PolicyOnClock]:
    """Return what makes each policy; the simulated clock is for the one that forgets by time."""
    return {
        "affinity": lambda clock: AdapterAffinity(seed=seed, clock=clock),
        "random": lambda clock: RandomChoice(seed),
        "round_robin": lambda clock: RoundRobin(),
        "consistent_hashing": lambda clock: ConsistentHashing(),
    }


def make_traffic(options: argparse.Namespace) -> Traffic:
    """Return requests at `utilisation` of what all slots can do."""
    generator = np.random.default_rng(options.seed)
    per_second = options.utilisation * options.replicas * options.slots / options.run_seconds
    ranks = np.arange(1, options.adapters + 1, dtype=np.float64)
    shares = ranks**-options.zipf / (ranks**-options.zipf).sum()
    return Traffic(
        np.cumsum(generator.exponential(1 / per_second, options.requests)).tolist(),
        generator.choice(options.adapters, options.requests, p=shares).tolist(),
        generator.exponential(options.run_seconds, options.requests).tolist(),
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the adapters' popularity")
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument("--warm-up", type=int, default=150_000, help="requests that are not counted")
    parser.add_argument("--utilisation", type=float, default=0.7, help="of all slots")
    parser.add_argument("--slots", type=int, default=8, help="requests that run at once on a replica")
    parser.add_argument("--memory", type=int, default=100, help="adapters that a replica holds")
    parser.add_argument("--run-seconds", type=float, default=1.0, help="mean time of a request")
    parser.add_argument("--adapter-seconds", type=float, default=0.5, help="time to load an adapter")
    parser.add_argument("--told-seconds", type=float, default=0.25, help="lag of what replicas tell")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
