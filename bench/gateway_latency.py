"""What the gateway adds to a completion: time at a steady rate, and unevenness of many streams at once.

The inference service behind it computes nothing, so what is measured is the gateway: key, limits in Valkey,
routing, translation. Direct gRPC and the gateway take turns in the same run, against the same service.

First an open loop at a fixed rate, with answers that come at once: what the gateway adds at a percentile is
the difference of the two doors' percentiles, of the time to the end of a whole answer and of the time to the
first token of a stream. Then many concurrent streams of a service that gives each a token at every step: the
gaps between tokens. The last line is JSON.

    python -m bench.gateway_latency
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import psutil

from bench.gateway_doors import Addresses, Answer, Door, both_doors, open_doors, percentile

TARGET_ADDED_P50_MS = 3.0
TARGET_ADDED_P99_MS = 15.0
TARGET_GAP_RATIO = 2.0
WARM_UP_REQUESTS = 100


def main() -> None:
    """Run both parts and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=50.0, help="requests per second")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each door")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer in the open loop")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=50.0, help="between the tokens of a stream")
    parser.add_argument("--stream-tokens", type=int, default=100)
    parser.add_argument("--limits", choices=("valkey", "process"), default="valkey")
    options = parser.parse_args()
    # The load's own pauses would be counted as the gateway's.
    gc.disable()
    result = {"bench": "gateway_latency", **vars(options)}
    with open_doors(step_seconds=0.0, limits=options.limits) as addresses:
        result["added"] = asyncio.run(steady(addresses, options))
    step_seconds, places = options.step_ms / 1e3, 2 * options.streams
    with open_doors(step_seconds=step_seconds, places=places, limits=options.limits) as addresses:
        result["streams_at_once"] = asyncio.run(many_streams(addresses, options))
    # The direct door's own figures say what the machine was worth meanwhile.
    result["load_average"] = os.getloadavg()[0]
    result["targets"] = {
        "added_p50_ms": TARGET_ADDED_P50_MS,
        "added_p99_ms": TARGET_ADDED_P99_MS,
        "gap_p99_over_median": TARGET_GAP_RATIO,
    }
    print(json.dumps(result))


async def steady(addresses: Addresses, options: argparse.Namespace) -> dict[str, Any]:
    """Ask both doors in turns at a fixed rate; return what the gateway adds."""
    times: dict[tuple[str, str], list[float]] = {}
    busy_seconds: dict[bool, float] = {False: 0.0, True: 0.0}
    async with both_doors(addresses) as doors:
        for door in doors:
            await at_rate(door, options.rate, WARM_UP_REQUESTS, options.tokens, stream=True)
        for _ in range(options.rounds):
            for stream in (False, True):
                for door in doors:
                    number = int(options.rate * options.seconds / 2)
                    before = cpu_seconds()
                    answers = await at_rate(door, options.rate, number, options.tokens, stream=stream)
                    assert all(answer.status == "ok" for answer in answers), answers
                    busy_seconds[stream] += cpu_seconds() - before if door.name == "gateway" else 0.0
                    whole = [answer.whole_seconds for answer in answers]
                    times.setdefault((door.name, f"whole, stream={stream}"), []).extend(whole)
                    if stream:
                        first = [answer.first_seconds for answer in answers]
                        times.setdefault((door.name, "first token"), []).extend(first)
    report: dict[str, Any] = {}
    for what in ("whole, stream=False", "whole, stream=True", "first token"):
        direct, gateway = times["direct", what], times["gateway", what]
        row: dict[str, Any] = {"requests": len(gateway)}
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            row[f"direct_{name}_ms"] = milliseconds(percentile(direct, share))
            row[f"gateway_{name}_ms"] = milliseconds(percentile(gateway, share))
            added = percentile(gateway, share) - percentile(direct, share)
            row[f"added_{name}_ms"] = milliseconds(added)
        row["within_target"] = (
            row["added_p50_ms"] <= TARGET_ADDED_P50_MS and row["added_p99_ms"] <= TARGET_ADDED_P99_MS
        )
        row["gateway_cpu_ms_per_request"] = milliseconds(
            busy_seconds[what != "whole, stream=False"] / len(gateway)
        )
        report[what] = row
        print(f"{what:20} {row}", flush=True)
    return report


async def at_rate(door: Door, rate: float, requests: int, tokens: int, *, stream: bool) -> list[Answer]:
    """Ask at fixed times, whether or not earlier requests were answered."""
    start = time.monotonic() + 0.1
    tasks = []
    for number in range(requests):
        due = start + number / rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(door.ask(due, tokens, stream=stream)))
    return await asyncio.gather(*tasks)


async def many_streams(addresses: Addresses, options: argparse.Namespace) -> dict[str, Any]:
    """Open many streams at once through each door in turn; return the gaps between tokens."""
    gaps: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    async with both_doors(addresses) as doors:
        for _ in range(max(1, options.rounds // 2)):
            for door in doors:
                before = cpu_seconds()
                began_at = time.monotonic()
                answers = await asyncio.gather(
                    *(door.ask(began_at, options.stream_tokens, stream=True) for _ in range(options.streams))
                )
                passed = time.monotonic() - began_at
                assert all(answer.status == "ok" for answer in answers)
                assert all(len(answer.tokens_at) == options.stream_tokens for answer in answers)
                gaps.setdefault(door.name, []).extend(gap for answer in answers for gap in gaps_of(answer))
                busy.setdefault(door.name, []).append((cpu_seconds() - before) / passed)
    report: dict[str, Any] = {}
    for name, values in gaps.items():
        median, tail = statistics.median(values), percentile(values, 0.99)
        report[name] = {
            "gaps": len(values),
            "gap_median_ms": milliseconds(median),
            "gap_p99_ms": milliseconds(tail),
            "gap_max_ms": milliseconds(max(values)),
            "p99_over_median": round(tail / median, 2),
            "within_target": tail <= TARGET_GAP_RATIO * median,
            "gateway_cpus": round(statistics.mean(busy[name]), 2),
        }
        print(f"{options.streams} streams, {name:8} {report[name]}", flush=True)
    return report


def gaps_of(answer: Answer) -> Sequence[float]:
    """Return the times between the tokens of one stream."""
    pairs = zip(answer.tokens_at, answer.tokens_at[1:], strict=False)
    return [later - earlier for earlier, later in pairs]


def cpu_seconds() -> float:
    """Return the processor time that the gateway, a child of this process, has used so far."""
    (gateway,) = (child for child in psutil.Process().children() if "services.gateway" in child.cmdline())
    times = gateway.cpu_times()
    return float(times.user + times.system)


def milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 2)


if __name__ == "__main__":
    main()
