"""What a cold adapter costs its first request, and what a stalled one costs the others.

A real registry and a real inference service, each a process of its own. In turns: the first token of an
adapter that is not on this host, the first token of the same adapter when it is warm, and the bare work of a
cold start, which is downloading the same bytes by the same call and parsing them into tensors, without any
service around it. The figure is the median of cold - warm - bare, in milliseconds.

Then, while streams decode on warm adapters, one more adapter is asked for, and a proxy before the registry
holds everything back for 5 seconds: the 99th percentile of the time between the streams' tokens, against as
many seconds of the same streams without that. The last line is JSON.

    python -m bench.cold_start --base assets/base
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import torch

from bench.many_adapters import BASE_NAME, RandomAdapter, published
from bench.service_process import service_process
from lorafleet.inference.v1 import generation_pb2, inference_service_pb2
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from lorafleet.registry.v1.adapter_pb2 import DownloadVersionRequest
from services.common.adapter_format import CONFIG_FILE, WEIGHTS_FILE
from services.common.base_loading import load_base_model, torch_dtype
from services.common.call_context import call_scope
from services.common.channels import open_channel
from services.common.fingerprint import ComputeDtype, Quantization
from services.inference.adapters.reader import read_adapter
from services.inference.adapters.targets import LoraTargets
from services.inference.model.attention import ATTENTION_NAME
from services.inference.model.linear import install_lora
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.registry import Client

TENANT = "acme"
STALL_SECONDS = 5.0
WARM_ADAPTERS = 4
SETTLE_SECONDS = 0.5
# The first tokens of streams that begin together are not decoded like the others.
SETTLING_TOKENS = 20


def main() -> None:
    """Run both parts and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("assets/base"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=30, help="cold starts")
    parser.add_argument("--streams", type=int, default=8, help="streams while an adapter stalls")
    parser.add_argument("--rounds", type=int, default=3, help="stalls")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(options, Path(folder)))
    print(json.dumps(result))


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start everything, measure both parts, and return the figures."""
    quantization = Quantization.none(ComputeDtype.FLOAT32)
    adapters = [
        RandomAdapter(f"adapter-{number}", options.rank, number)
        for number in range(options.adapters + WARM_ADAPTERS + options.rounds)
    ]
    async with published(folder, options.base, quantization, adapters) as (registry, target):
        host, _, port = target.rpartition(":")
        async with fault_proxy(host, int(port)) as proxy, inference(options, folder, proxy) as stub:
            names = [one.name for one in adapters]
            warm, cold, stalled = (
                names[:WARM_ADAPTERS],
                names[WARM_ADAPTERS : WARM_ADAPTERS + options.adapters],
                names[WARM_ADAPTERS + options.adapters :],
            )
            for name in warm:
                await first_token_seconds(stub, f"{name}:1")
            starts = await cold_starts(options, registry, stub, cold, folder)
            stalls = await stalls_of(options, stub, proxy, warm, stalled)
    return {
        "bench": "cold_start",
        "base": options.base.name,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "rank": options.rank,
        **starts,
        **stalls,
    }


@asynccontextmanager
async def inference(
    options: argparse.Namespace, folder: Path, proxy: FaultProxy
) -> AsyncIterator[InferenceServiceStub]:
    """Run the service behind the proxy; yield its stub once it serves."""
    settings = {
        "BASE_NAME": BASE_NAME,
        "BASE_PATH": options.base.resolve(),
        "QUANTIZATION": "none",
        "COMPUTE_DTYPE": "float32",
        "DEVICE": "cpu",
        "ADAPTER_CACHE_PATH": folder / "cache",
        "REGISTRY_TARGET": f"127.0.0.1:{proxy.port}",
        "ENABLE_PREFIX_CACHE": "false",
        "RESOLVE_FRESH_SECONDS": 3600,
    }
    with service_process("inference", folder, settings) as address:
        async with open_channel(address) as channel:
            stub = InferenceServiceStub(channel)
            await until_ready(stub)
            yield stub


async def until_ready(stub: Any) -> None:
    """Wait until calls are let in."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with call_scope(tenant=TENANT):
                await stub.GetStatus(inference_service_pb2.GetStatusRequest(), timeout=5)
            return
        except grpc.aio.AioRpcError:
            assert time.monotonic() < deadline, "the service does not become ready"
            await asyncio.sleep(0.05)


def request_for(adapter: str, tokens: int) -> generation_pb2.GenerateRequest:
    """Return a greedy request of so many tokens."""
    return generation_pb2.GenerateRequest(
        model=generation_pb2.ModelRef(adapter=adapter),
        tokens=generation_pb2.TokenPrompt(token_ids=range(100, 116)),
        sampling=generation_pb2.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
    )


async def first_token_seconds(stub: Any, adapter: str) -> float:
    """Return the time from the call to its first token."""
    started = time.perf_counter()
    with call_scope(tenant=TENANT):
        call = stub.Generate(request_for(adapter, 2), timeout=60)
        async for response in call:
            if response.HasField("delta"):
                seconds = time.perf_counter() - started
                async for _ in call:
                    pass
                return seconds
    raise AssertionError("a stream without tokens")


async def cold_starts(
    options: argparse.Namespace, registry: Client, stub: Any, names: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Measure every adapter cold, warm and bare."""
    targets = targets_of(options.base)
    rows = []
    for number, name in enumerate(names):
        bare_folder = folder / "bare" / name
        bare_folder.mkdir(parents=True)
        # The order changes, so that neither always profits from what the other has left in caches.
        if number % 2:
            bare = await bare_seconds(registry, name, bare_folder, targets)
            cold = await first_token_seconds(stub, name)
        else:
            cold = await first_token_seconds(stub, name)
            bare = await bare_seconds(registry, name, bare_folder, targets)
        warm = statistics.median([await first_token_seconds(stub, name) for _ in range(3)])
        rows.append((cold, warm, bare))
    added = [(cold - warm - bare) * 1e3 for cold, warm, bare in rows]
    cold_ms, warm_ms, bare_ms = (statistics.median(column) * 1e3 for column in zip(*rows, strict=True))
    print(f"first token: cold {cold_ms:.1f} ms, warm {warm_ms:.1f} ms; bare load {bare_ms:.1f} ms")
    return {
        "adapters": len(rows),
        "adapter_bytes": sum(path.stat().st_size for path in bare_folder.iterdir()),
        "cold_first_token_ms": round(cold_ms, 2),
        "warm_first_token_ms": round(warm_ms, 2),
        "bare_load_ms": round(bare_ms, 2),
        "added_ms_median": round(statistics.median(added), 2),
        "added_ms_p95": round(statistics.quantiles(added, n=20)[-1], 2),
    }


async def bare_seconds(registry: Client, name: str, folder: Path, targets: LoraTargets) -> float:
    """Return the time to download the two files and to parse them."""
    started = time.perf_counter()
    with call_scope(tenant=TENANT):
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            with (folder / file).open("wb") as out:
                async for response in registry.adapters.DownloadVersion(
                    DownloadVersionRequest(ref=name, file=file), timeout=60
                ):
                    out.write(response.data)
    read_adapter(folder, targets, torch.float32)
    return time.perf_counter() - started


def targets_of(base: Path) -> LoraTargets:
    """Return what adapters of the base may change."""
    quantization = Quantization.none(ComputeDtype.FLOAT32)
    assert torch_dtype(quantization) is torch.float32
    model = load_base_model(base, quantization, device=torch.device("cpu"), attention=ATTENTION_NAME)
    return install_lora(model)[1]


async def stalls_of(
    options: argparse.Namespace, stub: Any, proxy: FaultProxy, warm: Sequence[str], stalled: Sequence[str]
) -> dict[str, Any]:
    """Measure the gaps between tokens of running streams, in turns without and with a stalled load."""
    quiet: list[float] = []
    disturbed: list[float] = []
    for name in stalled:
        quiet += await gaps_of(options, stub, warm)
        load = asyncio.create_task(load_through_a_stall(stub, proxy, name))
        disturbed += await gaps_of(options, stub, warm)
        await load
    before, during = (statistics.quantiles(gaps, n=100)[-1] * 1e3 for gaps in (quiet, disturbed))
    print(f"time between tokens, P99: {before:.2f} ms, with a stalled load {during:.2f} ms")
    return {
        "streams": options.streams,
        "stall_seconds": STALL_SECONDS,
        "gaps": len(quiet),
        "gap_p50_ms": round(statistics.median(quiet) * 1e3, 3),
        "gap_p50_stalled_ms": round(statistics.median(disturbed) * 1e3, 3),
        "gap_p99_ms": round(before, 3),
        "gap_p99_stalled_ms": round(during, 3),
        "gap_p99_change": round(during / before - 1, 4),
    }


async def load_through_a_stall(stub: Any, proxy: FaultProxy, name: str) -> None:
    """Ask for an adapter that the registry sends only after a while."""
    ref = f"{name}:1"
    with call_scope(tenant=TENANT):
        # Drops nothing, but resolves the reference, so that the load alone is stalled.
        await stub.Evict(inference_service_pb2.EvictRequest(adapter=ref), timeout=30)
    await asyncio.sleep(SETTLE_SECONDS)
    proxy.latency_seconds = STALL_SECONDS
    first = asyncio.create_task(first_token_seconds(stub, ref))
    await asyncio.sleep(STALL_SECONDS)
    proxy.latency_seconds = 0.0
    seconds = await first
    assert seconds > STALL_SECONDS * 0.9, "nothing stalled"


async def gaps_of(options: argparse.Namespace, stub: Any, warm: Sequence[str]) -> list[float]:
    """Decode on warm adapters for about as long as a stall lasts; return the times between tokens."""
    deadline = time.perf_counter() + SETTLE_SECONDS + STALL_SECONDS
    streams = [
        stream_gaps(stub, f"{warm[number % len(warm)]}:1", deadline) for number in range(options.streams)
    ]
    return [gap for gaps in await asyncio.gather(*streams) for gap in gaps]


async def stream_gaps(stub: Any, adapter: str, deadline: float) -> list[float]:
    """Return the times between the tokens of one stream until the deadline."""
    times: list[float] = []
    with call_scope(tenant=TENANT):
        call = stub.Generate(request_for(adapter, 1000), timeout=60)
        async for response in call:
            if response.HasField("delta"):
                times.append(time.perf_counter())
                if times[-1] > deadline:
                    call.cancel()
                    break
    return [after - before for before, after in itertools.pairwise(times[SETTLING_TOKENS:])]


if __name__ == "__main__":
    main()
