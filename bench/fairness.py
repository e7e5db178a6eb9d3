"""One tenant floods, twenty are quiet: what the flood costs the quiet ones, with and without fair shares.

Twenty-one tenants, each with an adapter of its own, on one engine and its thread. The quiet tenants' requests
come at random times, at 0.3 of the rate that the engine can do, as measured first. The same times are used in
every part of the run: alone, beside a tenant that sends 200 requests at once, and beside the same flood on an
engine that serves first come, first served. No prompt is sent twice. What counts is the time to first token
of the quiet. The last line is JSON.

    python -m bench.fairness --base assets/base
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from bench.many_adapters import RandomAdapter, files_of, linear_shapes
from services.common.ids import new_id
from services.inference.assembly import build_engine
from services.inference.config import EngineConfig
from services.inference.driver import Driver
from services.inference.engine.events import TokenEvent
from services.inference.engine.request import Request, SamplingParams

FLOOD = "flood"
DRAIN_SECONDS = 120.0
CONTENTS = random.Random(0)


@dataclass(slots=True)
class Call:
    """One request and when its tokens came."""

    tenant: str
    sent_at: float
    first_token_at: float | None = None
    tokens: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def note(self, event: TokenEvent) -> None:
        """Take an event, on the engine's thread."""
        assert event.error is None, event.error
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self.ended.set()

    @property
    def first_token_seconds(self) -> float:
        """Time to first token."""
        assert self.first_token_at is not None
        return self.first_token_at - self.sent_at


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of the run gave."""

    quiet: Sequence[Call]
    flood_tokens: int
    tokens_per_second: float
    preemptions: int

    @property
    def first_token_seconds(self) -> list[float]:
        return [call.first_token_seconds for call in self.quiet]


def main() -> None:
    """Run the parts in turn and print what they gave."""
    options = parse_options()
    options.vocabulary = AutoConfig.from_pretrained(options.base, local_files_only=True).vocab_size
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_adapters(options, Path(scratch))
        fair = start(options, Path(scratch), folders, "fair")
        first_come = start(options, Path(scratch), folders, "fcfs")
        for driver in (first_come, fair):
            options.quiet_per_second = options.quiet_load * warm(driver, options)
        alone, beside = [], []
        for number in range(options.rounds):
            alone.append(run_part(fair, options, seed=number, flood=0))
            beside.append(run_part(fair, options, seed=number, flood=options.flood))
        plain = run_part(first_come, options, seed=0, flood=options.flood)
        fair.stop()
        first_come.stop()
    report(options, {"alone": alone, "beside_flood": beside, "beside_flood_first_come": [plain]})


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("assets/base"))
    parser.add_argument("--quantization", choices=("nf4", "none"), default="none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=60, help="of all quiet tenants, in each part")
    parser.add_argument("--quiet", type=int, default=20, help="quiet tenants")
    parser.add_argument(
        "--quiet-load", type=float, default=0.3, help="the quiet tenants' part of what the engine can do"
    )
    parser.add_argument("--quiet-prompt", type=int, default=64)
    parser.add_argument("--quiet-tokens", type=int, default=32)
    parser.add_argument("--flood", type=int, default=200, help="requests that the flood sends at once")
    parser.add_argument("--flood-prompt", type=int, default=64)
    parser.add_argument("--flood-tokens", type=int, default=100)
    parser.add_argument("--places", type=int, default=16, help="most sequences of one step")
    parser.add_argument("--batch-tokens", type=int, default=256, help="most tokens of one step")
    parser.add_argument("--rank", type=int, default=8)
    return parser.parse_args()


def make_adapters(options: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """Write an adapter for every tenant; return digests and folders."""
    shapes = linear_shapes(options.base)
    folders = {}
    for number, tenant in enumerate([FLOOD, *quiet_tenants(options)]):
        folder = scratch / tenant
        folder.mkdir()
        for name, content in files_of(RandomAdapter(tenant, options.rank, number), shapes).items():
            (folder / name).write_bytes(content)
        folders[digest_of(tenant)] = folder
    return folders


def quiet_tenants(options: argparse.Namespace) -> list[str]:
    return [f"quiet-{number}" for number in range(options.quiet)]


def digest_of(tenant: str) -> str:
    return "sha256:" + tenant.encode().hex().ljust(64, "0")


class Folders:
    """Fetches adapters from local folders."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders

    def fetch(self, digest: str, into: Path) -> None:
        for file in self._folders[digest].iterdir():
            (into / file.name).write_bytes(file.read_bytes())


def start(
    options: argparse.Namespace,
    scratch: Path,
    folders: Mapping[str, Path],
    policy: Literal["fair", "fcfs"],
) -> Driver:
    """Start an engine and its thread."""
    config = EngineConfig(
        base_path=options.base,
        adapter_cache_path=scratch / f"cache-{policy}",
        quantization=options.quantization,
        device="cpu",
        cpu_threads=options.threads,
        max_num_seqs=options.places,
        max_batch_tokens=options.batch_tokens,
        scheduling_policy=policy,
    )
    driver = Driver(build_engine(config, Folders(folders)), max_queued_requests=10_000)
    driver.start()
    return driver


def warm(driver: Driver, options: argparse.Namespace) -> float:
    """Load every adapter; return how many requests like those of the quiet the engine can do in a second."""
    tenants = [FLOOD, *quiet_tenants(options)]
    for _ in range(3):
        started = time.monotonic()
        calls = [
            send(driver, tenant, prompt(options, options.quiet_prompt), options.quiet_tokens)[1]
            for tenant in tenants
        ]
        for call in calls:
            assert call.ended.wait(DRAIN_SECONDS), "a request did not end"
    return len(tenants) / (time.monotonic() - started)


def run_part(driver: Driver, options: argparse.Namespace, *, seed: int, flood: int) -> Part:
    """Send the flood, then the quiet tenants' requests at their times; wait for the quiet; drop the flood."""
    draw = random.Random(seed)
    before = driver.stats()
    started = time.monotonic()
    floods = [
        send(driver, FLOOD, prompt(options, options.flood_prompt), options.flood_tokens) for _ in range(flood)
    ]
    tenants = quiet_tenants(options)
    quiet: list[Call] = []
    next_at = time.monotonic()
    for _ in range(options.requests):
        next_at += draw.expovariate(options.quiet_per_second)
        ids = prompt(options, options.quiet_prompt)
        time.sleep(max(0.0, next_at - time.monotonic()))
        quiet.append(send(driver, draw.choice(tenants), ids, options.quiet_tokens)[1])
    for call in quiet:
        assert call.ended.wait(DRAIN_SECONDS), "a quiet request did not end"
    passed_seconds = time.monotonic() - started
    flood_tokens = sum(call.tokens for _, call in floods)
    for request_id, _ in floods:
        driver.abort(request_id)
    while driver.stats().running or driver.stats().waiting:
        time.sleep(0.01)
    tokens = flood_tokens + sum(call.tokens for call in quiet)
    return Part(quiet, flood_tokens, tokens / passed_seconds, driver.stats().preemptions - before.preemptions)


def prompt(options: argparse.Namespace, length: int) -> tuple[int, ...]:
    """Return a prompt that was never sent before, so that the prefix cache finds none of it."""
    return tuple(CONTENTS.randrange(8, options.vocabulary) for _ in range(length))


def send(driver: Driver, tenant: str, ids: tuple[int, ...], max_tokens: int) -> tuple[str, Call]:
    """Submit one request of `tenant`; return its id and what will be known of it."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    call = Call(tenant, time.monotonic())
    request = Request(new_id("gen"), ids, sampling, digest_of(tenant), tenant=tenant)
    driver.submit(request, call.note)
    return request.id, call


def report(options: argparse.Namespace, parts: Mapping[str, Sequence[Part]]) -> None:
    """Print a table, and the same as JSON on the last line."""
    result: dict[str, Any] = {"bench": "fairness", "base": options.base.name, "device": "cpu"}
    result |= {name: value for name, value in vars(options).items() if name != "base"}
    result["torch_threads"] = torch.get_num_threads()
    for name, each in parts.items():
        seconds = [value for part in each for value in part.first_token_seconds]
        result[name] = {
            "quiet_requests": len(seconds),
            "quiet_first_token_ms_p50": milliseconds(statistics.median(seconds)),
            "quiet_first_token_ms_p95": milliseconds(percentile_95(seconds)),
            "quiet_first_token_ms_p95_by_round": [
                milliseconds(percentile_95(part.first_token_seconds)) for part in each
            ],
            "flood_tokens": sum(part.flood_tokens for part in each),
            "tokens_per_second": round(statistics.mean(part.tokens_per_second for part in each)),
            "preemptions": sum(part.preemptions for part in each),
        }
        row = result[name]
        print(
            f"{name:26} quiet TTFT P50 {row['quiet_first_token_ms_p50']:9.1f} ms"
            f"   P95 {row['quiet_first_token_ms_p95']:9.1f} ms   {row['tokens_per_second']:6d} tok/s"
        )
    alone = result["alone"]["quiet_first_token_ms_p95"]
    result["p95_ratio_fair"] = round(result["beside_flood"]["quiet_first_token_ms_p95"] / alone, 2)
    rounds = zip(parts["alone"], parts["beside_flood"], strict=True)
    result["p95_ratio_fair_by_round"] = [
        round(percentile_95(beside.first_token_seconds) / percentile_95(one.first_token_seconds), 2)
        for one, beside in rounds
    ]
    result["p95_ratio_first_come"] = round(
        result["beside_flood_first_come"]["quiet_first_token_ms_p95"] / alone, 2
    )
    print(json.dumps(result))


def percentile_95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 1)


if __name__ == "__main__":
    main()
