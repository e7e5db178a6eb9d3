"""What a gateway and a full engine do when five times as much is asked as they can do.

The inference service computes nothing, but has an engine's places, queue and steps, and refuses beyond its
queue as ours does; so what it can do is known, and what is measured is the refusing. The peak is what a
closed loop that keeps every place taken gets done. Then an open loop asks for a multiple of that rate,
whether or not anything is answered. Peak and overload take turns; every other request is a stream.

Good-put counts the answers that ended well, over the time in which requests were sent. A refusal's time is
counted from when its request was due. The last line is JSON.

    python -m bench.gateway_overload
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bench.gateway_doors import Answer, Door, both_doors, open_doors, percentile

TARGET_GOOD_PUT = 0.9
TARGET_REJECT_SECONDS = 0.05


@dataclass(slots=True)
class Turns:
    """What one door did: answers that ended well per second, turn by turn, and what became of the rest."""

    peak: list[float] = field(default_factory=list)
    overload: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Return the figures."""
        statuses = Counter(answer.status for answer in self.answers)
        rejects = [answer.whole_seconds for answer in self.answers if answer.status == "queue_full"]
        served = [answer.whole_seconds for answer in self.answers if answer.status == "ok"]
        peak, overload = sum(self.peak) / len(self.peak), sum(self.overload) / len(self.overload)
        return {
            "peak_per_second": [round(rate, 2) for rate in self.peak],
            "overload_good_put_per_second": [round(rate, 2) for rate in self.overload],
            "good_put_of_peak": round(overload / peak, 3),
            "asked": len(self.answers),
            "statuses": dict(statuses),
            "reject_p50_ms": round(percentile(rejects, 0.5) * 1e3, 1),
            "reject_p99_ms": round(percentile(rejects, 0.99) * 1e3, 1),
            "rejects_over_50_ms": sum(seconds > TARGET_REJECT_SECONDS for seconds in rejects),
            "served_p99_ms": round(percentile(served, 0.99) * 1e3, 1),
            "within_target": overload >= TARGET_GOOD_PUT * peak
            and percentile(rejects, 0.99) <= TARGET_REJECT_SECONDS,
        }


def main() -> None:
    """Run the turns and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--places", type=int, default=16, help="requests that run at once")
    parser.add_argument("--queue", type=int, default=16, help="requests that wait")
    parser.add_argument("--step-ms", type=float, default=25.0)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--factor", type=float, default=5.0, help="how many times the peak is asked for")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of a turn")
    parser.add_argument("--limits", choices=("valkey", "process"), default="valkey")
    options = parser.parse_args()
    # The load's own pauses would be counted as the gateway's.
    gc.disable()
    turns = asyncio.run(run(options))
    result: dict[str, Any] = {
        "bench": "gateway_overload",
        **vars(options),
        "capacity_per_second": round(options.places / (options.tokens * options.step_ms / 1e3), 2),
        "load_average": os.getloadavg()[0],
        "targets": {"good_put_of_peak": TARGET_GOOD_PUT, "reject_p99_ms": TARGET_REJECT_SECONDS * 1e3},
        **{name: of_door.report() for name, of_door in turns.items()},
    }
    print(json.dumps(result))


async def run(options: argparse.Namespace) -> dict[str, Turns]:
    """Let each door have its turns, the gateway's and the direct ones in the same run."""
    turns: dict[str, Turns] = {}
    doors_open = open_doors(
        step_seconds=options.step_ms / 1e3,
        places=options.places,
        queue=options.queue,
        limits=options.limits,
    )
    with doors_open as addresses:
        async with both_doors(addresses) as doors:
            for number in range(options.rounds):
                for door in doors:
                    of_door = turns.setdefault(door.name, Turns())
                    of_door.peak.append(await closed_loop(door, options))
                    rate, answers = await open_loop(door, options, options.factor * of_door.peak[-1])
                    of_door.overload.append(rate)
                    of_door.answers += answers
                    rates = f"peak {of_door.peak[-1]:6.2f}/s   overload {rate:6.2f}/s"
                    print(f"turn {number}, {door.name:8} {rates}", flush=True)
    return turns


async def closed_loop(door: Door, options: argparse.Namespace) -> float:
    """Keep all places taken and some waiting; return how many answers ended well per second."""
    seconds: float = options.seconds
    ends = time.monotonic() + seconds

    async def keep_asking() -> int:
        done = 0
        while time.monotonic() < ends:
            answer = await door.ask(time.monotonic(), options.tokens, stream=bool(done % 2))
            done += answer.status == "ok" and answer.ended_at <= ends
        return done

    askers = options.places + options.queue // 2
    counts = await asyncio.gather(*(keep_asking() for _ in range(askers)))
    return sum(counts) / seconds


async def open_loop(door: Door, options: argparse.Namespace, rate: float) -> tuple[float, list[Answer]]:
    """Ask at a fixed rate; return how many answers ended well per second of it, and all answers."""
    start = time.monotonic()
    tasks: list[asyncio.Task[Answer]] = []
    while (due := start + len(tasks) / rate) < start + options.seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(door.ask(due, options.tokens, stream=bool(len(tasks) % 2))))
    answers = await asyncio.gather(*tasks)
    # The first answers end one service time after the start; as long after the last request they still do.
    ends = start + options.seconds
    good = sum(answer.status == "ok" and answer.ended_at <= ends for answer in answers)
    return good / options.seconds, answers


if __name__ == "__main__":
    main()
