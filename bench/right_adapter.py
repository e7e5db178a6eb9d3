"""Whether the right adapter answers while versions are published, aliases move and memory is evicted.

Every version is an adapter that answers with a number of its own (bench/spelling_model.py), part of it out of
the KV cache. Registry and inference are processes of their own. So many requests are in flight by name, by
version, by digest, by alias and for the base, with prompts that share their beginnings. Beside them, without
pause: new versions are published, aliases move, adapters are evicted from every tier, prefetched, pinned and
unpinned; the budgets of all tiers are far too small for the versions asked for. An answer is wrong if its
number is not that of the version which the stream said it would be, or that is a version which the reference
cannot have meant between the request and its first message. The last line is JSON.

    python -m bench.right_adapter --requests 100000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from bench.many_adapters import until_serving
from bench.service_process import START_SECONDS, service_process
from bench.spelling_model import NUMBERS, PLACES, QUESTION, adapter_files, make_base, number_of
from lorafleet.inference.v1 import generation_pb2 as messages
from lorafleet.inference.v1 import inference_service_pb2 as calls
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.call_context import call_scope
from services.common.channels import open_channel
from services.common.errors import LorafleetError
from services.common.status import from_rpc_error
from services.common.valkey import EmbeddedValkey
from tests.support.inference import InferenceClient
from tests.support.registry import Client, Upload

TENANT = "acme"
BASE_NAME = "spelling"
ALIAS = "prod"
RANKS = (2, 4, 8, 16)
BEGINNINGS = ("Which version are you", "Say your number, as all of them do: are you sure", "Who")
# Refusals that the contract has for what the churn does at the same moment; the requests are made again.
_REFUSALS_OF_CHURN = frozenset({"adapter_in_use", "adapter_loading", "pin_budget_exceeded"})


@dataclass
class Timeline:
    """What a reference may have meant: each value with when it was first and last possible."""

    values: list[tuple[float, int]] = field(default_factory=list)
    """(when the change to it began, version)."""
    settled: list[float] = field(default_factory=list)
    """When the change to each value was answered."""

    def begin(self, version: int) -> None:
        self.values.append((time.monotonic(), version))

    def done(self) -> None:
        self.settled.append(time.monotonic())

    def possible(self, began: float, ended: float) -> set[int]:
        """Return the versions that were meant at some moment between `began` and `ended`."""
        found = set()
        for index, (since, version) in enumerate(self.values):
            until = self.settled[index + 1] if index + 1 < len(self.settled) else float("inf")
            if since <= ended and until >= began:
                found.add(version)
        return found


@dataclass
class Name:
    """One adapter name: its versions' numbers and digests, and what it and its alias meant when."""

    name: str
    numbers: dict[int, int] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    latest: Timeline = field(default_factory=Timeline)
    alias: Timeline = field(default_factory=Timeline)


@dataclass
class Tally:
    """What came of the requests and of the churn."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    churn: Counter[str] = field(default_factory=Counter)


class Fleet:
    """Registry and inference under churn, and what is known of every version."""

    def __init__(self, registry: Client, inference: InferenceClient, base_digest: str, names: int) -> None:
        self.tally = Tally()
        self._registry = registry
        self._inference = inference
        self._base_digest = base_digest
        self._names = [Name(f"speller-{number}") for number in range(names)]
        self._draw = random.Random(7)
        self._free_numbers = self._draw.sample(range(NUMBERS), NUMBERS)

    async def publish(self, name: Name) -> None:
        """Publish the next version of a name, with a number that no version had."""
        number = self._free_numbers.pop()
        files = adapter_files(number, self._draw.choice(RANKS))
        upload = Upload(files["adapter_config.json"], files["adapter_model.safetensors"])
        version = len(name.numbers) + 1
        name.numbers[version] = number
        name.latest.begin(version)
        made = await self._registry.publish(upload, upload.header(name.name, base_digest=self._base_digest))
        assert made.version == version
        name.digests[version] = made.digest
        name.latest.done()

    async def move_alias(self, name: Name) -> None:
        """Let the alias name some version that is there."""
        version = self._draw.choice(list(name.digests))
        name.alias.begin(version)
        await self._registry.set_alias(ALIAS, version, adapter=name.name)
        name.alias.done()

    async def start(self) -> None:
        """Publish one version of each name and set its alias."""
        for name in self._names:
            await self.publish(name)
            await self.move_alias(name)

    async def ask(self, number: int) -> None:
        """Make one request and judge its answer."""
        name = self._draw.choice(self._names)
        kind = self._draw.choices(("name", "version", "digest", "alias", "base"), (3, 3, 1, 4, 1))[0]
        version = self._draw.choice(list(name.digests)[-4:])
        ref = {
            "name": name.name,
            "version": f"{name.name}:{version}",
            "digest": f"{name.name}@{name.digests[version]}",
            "alias": f"{name.name}@{ALIAS}",
            "base": "",
        }[kind]
        request = messages.GenerateRequest(
            model=messages.ModelRef(adapter=ref) if ref else messages.ModelRef(base=True),
            text=self._draw.choice(BEGINNINGS) + QUESTION,
            sampling=messages.SamplingParams(max_tokens=PLACES, temperature=0.0),
        )
        self.tally.kinds[kind] += 1
        began = time.monotonic()
        token_ids: list[int] = []
        started, ended = None, began
        try:
            with call_scope(tenant=TENANT):
                async for response in self._inference.stub.Generate(request, timeout=120):
                    if response.HasField("started"):
                        started, ended = response.started, time.monotonic()
                    elif response.HasField("delta"):
                        token_ids += response.delta.token_ids
        except grpc.aio.AioRpcError as error:
            self.tally.refused[from_rpc_error(error).reason] += 1
            return
        assert started is not None
        if kind == "base":
            problem = None if token_ids == [0] and not started.version_digest else "the base"
        else:
            timelines = {"name": name.latest, "alias": name.alias}
            meant = timelines[kind].possible(began, ended) if kind in timelines else {version}
            problem = _problem(name, started.version_ref, meant, number_of(token_ids))
        if problem is None:
            self.tally.right += 1
        else:
            self.tally.wrong.append(f"request {number} to {ref!r}: {problem}, {token_ids}")

    async def churn(self, until: asyncio.Event, pause_seconds: float) -> None:
        """Change things without end."""
        acts: dict[str, tuple[int, Callable[[Name], Awaitable[object]]]] = {
            "publish": (2, self.publish),
            "move_alias": (6, self.move_alias),
            "evict": (6, lambda name: self._steer(self._inference.stub.Evict, calls.EvictRequest, name)),
            "prefetch": (
                2,
                lambda name: self._steer(self._inference.stub.Prefetch, calls.PrefetchRequest, name),
            ),
            "pin": (1, lambda name: self._steer(self._inference.stub.Pin, calls.PinRequest, name)),
            "unpin": (3, lambda name: self._steer(self._inference.stub.Unpin, calls.UnpinRequest, name)),
        }
        weights = [weight for weight, _ in acts.values()]
        while not until.is_set():
            act = self._draw.choices(list(acts), weights)[0]
            try:
                await acts[act][1](self._draw.choice(self._names))
                self.tally.churn[act] += 1
            except LorafleetError as error:
                if error.reason not in _REFUSALS_OF_CHURN:
                    raise
                self.tally.churn[f"{act}: {error.reason}"] += 1
            await asyncio.sleep(pause_seconds)

    async def _steer(self, method: object, message: Callable[..., object], name: Name) -> None:
        version = self._draw.choice(list(name.digests)[-4:])
        await self._inference.call(method, message(adapter=f"{name.name}:{version}"))


def _problem(name: Name, version_ref: str, meant: set[int], number: int | None) -> str | None:
    """Return what is wrong with an answer, or None."""
    version = int(version_ref.removeprefix(f"{name.name}:"))
    if version not in meant:
        return f"version {version} where {sorted(meant)} were meant"
    if number != name.numbers[version]:
        return f"{number} in place of {name.numbers[version]}, that of {version_ref}"
    return None


async def measure(
    fleet: Fleet, *, requests: int, concurrency: int, pause_seconds: float
) -> dict[str, object]:
    """Make the requests under churn; return what came of them."""
    await fleet.start()
    done = asyncio.Event()
    churn = asyncio.create_task(fleet.churn(done, pause_seconds))
    numbers = iter(range(requests))

    async def ask_on() -> None:
        for number in numbers:
            await fleet.ask(number)
            if number and number % 10_000 == 0:
                print(f"{number} requests, {len(fleet.tally.wrong)} wrong", flush=True)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(ask_on())
    seconds = time.perf_counter() - started
    done.set()
    await churn
    tally = fleet.tally
    return {
        "requests": requests,
        "right": tally.right,
        "wrong": len(tally.wrong),
        "examples": tally.wrong[:10],
        "refused": dict(tally.refused),
        "kinds": dict(tally.kinds),
        "churn": dict(tally.churn),
        "seconds": round(seconds, 1),
        "requests_per_second": round(requests / seconds, 1),
    }


@asynccontextmanager
async def running(folder: Path, names: int) -> AsyncIterator[Fleet]:
    """Run both services, with memory for a few of the adapters only."""
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(EmbeddedValkey.start(folder / "valkey"))
        settings = {"REDIS_URL": valkey.url, "STORE_URL": f"file://{folder}/store"}
        registry_target = stack.enter_context(service_process("registry", folder, settings))
        registry_channel = await stack.enter_async_context(open_channel(registry_target))
        await asyncio.wait_for(until_serving(registry_channel), START_SECONDS)
        inference_target = stack.enter_context(
            service_process(
                "inference",
                folder,
                {
                    "BASE_PATH": make_base(folder / "base"),
                    "BASE_NAME": BASE_NAME,
                    "QUANTIZATION": "none",
                    "COMPUTE_DTYPE": "float32",
                    "DEVICE": "cpu",
                    "CPU_THREADS": 1,
                    "REGISTRY_TARGET": registry_target,
                    "ADAPTER_CACHE_PATH": folder / "cache",
                    "BLOCK_SIZE": 4,
                    "KV_BYTES": 8 << 20,
                    "ADAPTER_DEVICE_BYTES": 512 << 10,
                    "ADAPTER_HOST_BYTES": 1 << 20,
                    "ADAPTER_DISK_BYTES": 2 << 20,
                    "RESOLVE_FRESH_SECONDS": 5,
                },
            )
        )
        channel = await stack.enter_async_context(open_channel(inference_target))
        await asyncio.wait_for(until_serving(channel), START_SECONDS)
        client = InferenceClient(InferenceServiceStub(channel), TENANT)
        status = await client.status()
        yield Fleet(Client(registry_channel, TENANT), client, status.base_fingerprint_digest, names)


async def run(options: argparse.Namespace) -> dict[str, object]:
    """Run everything once."""
    with tempfile.TemporaryDirectory() as folder:
        async with running(Path(folder), options.names) as fleet:
            return await measure(
                fleet,
                requests=options.requests,
                concurrency=options.concurrency,
                pause_seconds=options.pause_seconds,
            )


def main() -> None:
    """Run everything and print what came of it; fail where an answer was wrong or a request refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--names", type=int, default=60)
    parser.add_argument("--pause-seconds", type=float, default=0.05, help="between two acts of the churn")
    result = asyncio.run(run(parser.parse_args()))
    print(json.dumps({"benchmark": "right_adapter"} | result))
    if result["wrong"] or result["refused"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
