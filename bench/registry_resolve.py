"""How long a resolve takes under a steady load, beside a publisher.

An open loop: resolves are sent at fixed times, whether or not earlier ones have been answered, and each is
timed from when it was due. The last line is JSON.

    python -m bench.registry_resolve --rate 200 --seconds 20
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from lorafleet.registry.v1 import base_model_pb2
from services.common.valkey import EmbeddedValkey
from tests.support.forked_registry import forked_registry
from tests.support.registry import Client, Place, Upload, base_message

ADAPTERS = 50


def main() -> None:
    """Load a registry over a folder, and print the times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=200.0, help="resolves per second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--publishes", type=float, default=1.0, help="publishes per second meanwhile")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey.start(Path(folder) / "valkey") as valkey:
        place = Place.in_directory(valkey.url, Path(folder) / "objects")
        latencies = sorted(asyncio.run(load(place, options)))
    result = {
        "benchmark": "registry_resolve",
        "resolves_per_second": options.rate,
        "publishes_per_second": options.publishes,
        "resolves": len(latencies),
        "p50_ms": round(at(latencies, 0.50) * 1000, 2),
        "p99_ms": round(at(latencies, 0.99) * 1000, 2),
        "max_ms": round(latencies[-1] * 1000, 2),
    }
    print(json.dumps(result))


async def load(place: Place, options: argparse.Namespace) -> list[float]:
    """Return the time of each resolve, in seconds."""
    async with forked_registry(place) as (_, client):
        request = base_model_pb2.CreateBaseModelRequest(base_model=base_message())
        await client.call(client.bases.CreateBaseModel, request)
        for number in range(ADAPTERS):
            await client.publish(Upload.made(number), adapter=f"adapter-{number}")
        publisher = asyncio.create_task(publish_for_ever(client, options.publishes))
        start = time.perf_counter()
        tasks = []
        for number in range(int(options.rate * options.seconds)):
            due = start + number / options.rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(resolve(client, f"adapter-{number % ADAPTERS}", due)))
        latencies = await asyncio.gather(*tasks)
        publisher.cancel()
        await asyncio.wait([publisher])
    return list(latencies)


async def resolve(client: Client, ref: str, due: float) -> float:
    await client.resolve(ref)
    return time.perf_counter() - due


async def publish_for_ever(client: Client, rate: float) -> None:
    number = 0
    while rate > 0:
        await asyncio.sleep(1 / rate)
        await client.publish(Upload.made(number), adapter="busy")
        number += 1


def at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    main()
