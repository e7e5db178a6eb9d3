"""Thousands of adapters against a handful: what the number of adapters costs an engine once it is warm.

A real registry in a process of its own holds all adapters, of mixed ranks. The same traffic, a fixed number
of requests in flight with greedy answers of fixed length, goes to an engine in this process twice, in turns:
with adapters drawn from all by Zipf's law, and from a handful by the same law. The device's budget is that of
64 adapters, the host's that of 512, so the tail comes from the disk, which has all, again and again. Tiers
are sampled throughout against their budgets; at the end everything is given back, and what is left is
printed. The last line is JSON.

    python -m bench.adapter_scale --base assets/base
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import itertools
import json
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.many_adapters import BASE_NAME, RANKS, RandomAdapter, files_of, linear_shapes, mixed, published
from services.common.adapter_format import WEIGHTS_FILE
from services.common.call_context import call_scope
from services.common.ids import new_id
from services.inference.adapters.cache import AdapterCache
from services.inference.adapters.disk import DiskTier
from services.inference.adapters.measures import CacheStats
from services.inference.adapters.stages import LoadTimes
from services.inference.driver import Driver
from services.inference.engine.events import TokenEvent
from services.inference.engine.request import Request, SamplingParams
from services.inference.resolver import AdapterResolver, ResolverLimits
from services.inference.runtime import LoadedBase, load, settle_interpreter
from services.inference.settings import InferenceSettings
from services.inference.sources import AdapterSource, AdapterSources
from tests.support.registry import Client

TENANT = "acme"
CACHE = "cache"
ON_DISK = "on-disk"


@dataclass
class Peaks:
    """The most bytes seen in each tier, sampled."""

    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0

    def note(self, stats: CacheStats) -> None:
        self.device_bytes = max(self.device_bytes, stats.device_used_bytes)
        self.host_bytes = max(self.host_bytes, stats.host_used_bytes)
        self.disk_bytes = max(self.disk_bytes, stats.disk_used_bytes)


@dataclass
class Round:
    """What one round of traffic did."""

    tokens_per_second: float
    loads_per_second: float
    ttft_p95_seconds: float


@dataclass
class Traffic:
    """Requests for adapters by Zipf's law, always `concurrency` of them in flight."""

    driver: Driver
    cache: AdapterCache
    digests: Sequence[str]
    options: argparse.Namespace
    draw: random.Random
    weights: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = list(
            itertools.accumulate((rank + 1) ** -self.options.zipf for rank in range(len(self.digests)))
        )

    def run(self, requests: int) -> tuple[float, list[float]]:
        """Serve so many requests; return tokens per second and the times to first token."""
        left = iter(range(requests))
        lock, done = threading.Lock(), threading.Event()
        waits: list[float] = []
        live = 0

        def begin() -> None:
            nonlocal live
            with lock:
                if next(left, None) is None:
                    if live == 0:
                        done.set()
                    return
                live += 1
                (digest,) = self.draw.choices(self.digests, cum_weights=self.weights)
                prompt = tuple(self.draw.randrange(8, 4000) for _ in range(self.options.prompt_tokens))
            sampling = SamplingParams(max_tokens=self.options.tokens, temperature=0.0, ignore_eos=True)
            asked_at = time.monotonic()

            def sink(event: TokenEvent) -> None:
                nonlocal live
                if event.error is not None:
                    raise event.error
                if event.completion_tokens == 1:
                    waits.append(time.monotonic() - asked_at)
                if event.finish_reason is not None:
                    with lock:
                        live -= 1
                    begin()

            self.driver.submit(Request(new_id("bench"), prompt, sampling, digest, tenant=TENANT), sink)

        started = time.perf_counter()
        for _ in range(self.options.concurrency):
            begin()
        assert done.wait(timeout=600), "the traffic does not come to an end"
        seconds = time.perf_counter() - started
        return requests * self.options.tokens / seconds, waits


def main() -> None:
    """Publish, warm up, take turns, give everything back, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("assets/base"))
    parser.add_argument("--quantization", choices=("nf4", "none"), default="none")
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--few", type=int, default=5, help="adapters of the traffic to compare with")
    parser.add_argument("--device-adapters", type=int, default=64, help="the device's budget")
    parser.add_argument("--host-adapters", type=int, default=512, help="the host's budget")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the popularity")
    parser.add_argument("--warm-requests", type=int, default=1500)
    parser.add_argument("--requests", type=int, default=200, help="of each round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="keep the registry and the disk's tier for the next run")
    parser.add_argument("--fill-only", action="store_true", help="end when both are filled")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        result = asyncio.run(measure(options, folder.resolve()))
    print(json.dumps(result))


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the whole bench."""
    adapters = mixed(options.adapters)
    mean_bytes = mean_float32_bytes(options.base, adapters)
    settings = settings_of(options, folder, mean_bytes, "127.0.0.1:1")
    async with published(folder, options.base, settings.base_quantization, adapters) as (client, target):
        sources = await resolve_all(client, adapters)
        await asyncio.to_thread(fill_disk, options.base, folder / ON_DISK, adapters, sources)
        if options.fill_only:
            return {"published": len(adapters)}
        # Links, because at its end the bench evicts everything.
        shutil.rmtree(folder / CACHE, ignore_errors=True)
        shutil.copytree(folder / ON_DISK, folder / CACHE, copy_function=os.link)
        settings = settings_of(options, folder, mean_bytes, target)
        base = await asyncio.to_thread(load, settings)
        settle_interpreter()
        for source in sources:
            base.sources.note(source)
        print(f"published {len(adapters)} adapters of {mean_bytes / 1e6:.2f} MB on average", flush=True)
        return await asyncio.to_thread(serve, options, settings, base, [one.digest for one in sources])


def serve(
    options: argparse.Namespace, settings: InferenceSettings, base: LoadedBase, digests: list[str]
) -> dict[str, Any]:
    """Warm the engine up, run both kinds of traffic in turns, and give everything back."""
    cache, draw = base.engine.adapters, random.Random(1)
    idle_rss = rss_bytes()
    driver = Driver(base.engine, max_queued_requests=4096)
    driver.start()
    many = Traffic(driver, cache, digests, options, draw)
    few = Traffic(driver, cache, digests[: options.few], options, draw)
    peaks, stop = Peaks(), threading.Event()
    sampler = threading.Thread(target=sample, args=(cache.stats, peaks, stop))
    sampler.start()
    try:
        few.run(options.requests)
        many.run(options.warm_requests)
        print(f"warm, after {cache.stats().loads} loads", flush=True)
        rounds = [(one_round(few, options), one_round(many, options)) for _ in range(options.rounds)]
    finally:
        stop.set()
        sampler.join()
    for number, (of_few, of_many) in enumerate(rounds):
        print(
            f"round {number}: {of_few.tokens_per_second:6.0f} tok/s over {options.few} adapters, "
            f"{of_many.tokens_per_second:6.0f} over {options.adapters}, "
            f"{of_many.loads_per_second:5.1f} loads/s"
        )
    warm_rss = rss_bytes()
    left = give_back(base, driver)
    ratio = statistics.median(
        of_many.tokens_per_second / of_few.tokens_per_second for of_few, of_many in rounds
    )
    stats = cache.stats()
    result = {
        "bench": "adapter_scale",
        "base": options.base.name,
        "quantization": options.quantization,
        "device": settings.device_type,
        "threads": torch.get_num_threads(),
        "adapters": options.adapters,
        "ranks": list(RANKS),
        "zipf": options.zipf,
        "concurrency": options.concurrency,
        "prompt_tokens": options.prompt_tokens,
        "decode_tokens": options.tokens,
        "few": options.few,
        "few_tokens_per_second": round(statistics.median(one.tokens_per_second for one, _ in rounds), 1),
        "many_tokens_per_second": round(statistics.median(one.tokens_per_second for _, one in rounds), 1),
        "ratio": round(ratio, 4),
        "many_loads_per_second": round(statistics.median(one.loads_per_second for _, one in rounds), 2),
        "few_ttft_p95_ms": round(statistics.median(one.ttft_p95_seconds for one, _ in rounds) * 1e3, 1),
        "many_ttft_p95_ms": round(statistics.median(one.ttft_p95_seconds for _, one in rounds) * 1e3, 1),
        "loads": stats.loads,
        "load_failures": stats.load_failures,
        "host_evictions": stats.host_evictions,
        "device_evictions": stats.device_evictions,
        "device_budget_bytes": settings.adapter_device_bytes,
        "device_peak_bytes": peaks.device_bytes,
        "host_budget_bytes": settings.adapter_host_bytes,
        "host_peak_bytes": peaks.host_bytes,
        "disk_budget_bytes": settings.adapter_disk_bytes,
        "disk_peak_bytes": peaks.disk_bytes,
        "is_within_budgets": peaks.device_bytes <= settings.adapter_device_bytes
        and peaks.host_bytes <= settings.adapter_host_bytes
        and peaks.disk_bytes <= settings.adapter_disk_bytes,
        "rss_idle_bytes": idle_rss,
        "rss_warm_bytes": warm_rss,
    }
    return result | left


def one_round(traffic: Traffic, options: argparse.Namespace) -> Round:
    """Run one round."""
    cache = traffic.cache
    before, started = cache.stats().loads, time.perf_counter()
    tokens_per_second, waits = traffic.run(options.requests)
    seconds = time.perf_counter() - started
    return Round(
        tokens_per_second,
        (cache.stats().loads - before) / seconds,
        statistics.quantiles(waits, n=20)[-1],
    )


def give_back(base: LoadedBase, driver: Driver) -> dict[str, Any]:
    """Evict everything, stop, and return what is still held."""
    cache = base.engine.adapters
    residents = cache.residency()
    leases = sum(item.leases for item in residents)
    pins = sum(item.pins for item in residents)
    refused = [item.digest for item in residents if not cache.evict(item.digest)]
    for digest in cache.on_disk():
        cache.evict(digest)
    base.fetcher.close()
    driver.stop()
    stats, engine = cache.stats(), base.engine.stats()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return {
        "left_leases": leases,
        "left_pins": pins,
        "left_unevictable": len(refused),
        "left_device_bytes": stats.device_used_bytes,
        "left_host_bytes": stats.host_used_bytes,
        "left_disk_bytes": stats.disk_used_bytes,
        "left_kv_blocks": engine.kv_blocks_total - engine.kv_blocks_free,
        "rss_end_bytes": rss_bytes(),
    }


def sample(stats: Callable[[], CacheStats], peaks: Peaks, stop: threading.Event) -> None:
    """Note the tiers ten times a second."""
    while not stop.wait(0.1):
        peaks.note(stats())


def settings_of(
    options: argparse.Namespace, folder: Path, mean_bytes: int, registry_target: str
) -> InferenceSettings:
    """Return the settings of the engine: budgets in adapters of the mean size."""
    return InferenceSettings(
        base_path=options.base,
        base_name=BASE_NAME,
        adapter_cache_path=folder / CACHE,
        registry_target=registry_target,
        quantization=options.quantization,
        compute_dtype="float32",
        max_num_seqs=options.concurrency,
        max_queued_requests=4096,
        adapter_device_bytes=options.device_adapters * mean_bytes,
        adapter_host_bytes=options.host_adapters * mean_bytes,
        device_own_share=1.0,
        enable_prefix_cache=False,
        tenant_queue_share=1.0,
    )


def mean_float32_bytes(base: Path, adapters: Sequence[RandomAdapter]) -> int:
    """Return the mean size of the adapters in memory; they are published in half of it."""
    shapes = linear_shapes(base)
    by_rank = {
        adapter.rank: 2 * len(files_of(adapter, shapes)[WEIGHTS_FILE])
        for adapter in {one.rank: one for one in adapters}.values()
    }
    return sum(by_rank[adapter.rank] for adapter in adapters) // len(adapters)


async def resolve_all(client: Client, adapters: Sequence[RandomAdapter]) -> list[AdapterSource]:
    """Resolve every adapter once, which tells where its bytes are."""
    limits = ResolverLimits(timeout_seconds=10, fresh_seconds=0, stale_seconds=0)
    base_digest = (await client.resolve(adapters[0].name)).base_fingerprint_digest
    resolver = AdapterResolver(client.adapters, AdapterSources(), base_digest, limits)
    with call_scope(tenant=TENANT):
        return [await resolver.resolve(one.name, field="adapter") for one in adapters]


def fill_disk(
    base: Path, folder: Path, adapters: Sequence[RandomAdapter], sources: Sequence[AdapterSource]
) -> None:
    """Bring every adapter to the disk's tier, as if each had been asked for on this host before."""
    disk = DiskTier(folder, 1 << 62)
    maker = Maker(base, {source.digest: one for source, one in zip(sources, adapters, strict=True)})
    for source in sources:
        if source.digest not in disk:
            with disk.open(source.digest, maker, LoadTimes()):
                pass


class Maker:
    """Makes the files of published adapters anew, which is quicker than to download them all."""

    def __init__(self, base: Path, adapters: dict[str, RandomAdapter]) -> None:
        self._shapes = linear_shapes(base)
        self._adapters = adapters

    def fetch(self, digest: str, into: Path) -> None:
        for name, data in files_of(self._adapters[digest], self._shapes).items():
            (into / name).write_bytes(data)


def rss_bytes() -> int:
    """Return the memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


if __name__ == "__main__":
    main()
