"""A real inference service beside a real registry, on free ports, and the calls that clients make."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorafleet.inference.v1 import generation_pb2 as messages
from lorafleet.inference.v1 import inference_service_pb2 as calls
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from lorafleet.registry.v1 import adapter_pb2
from services.common.call_context import call_scope
from services.common.channels import open_channel
from services.common.server import ServiceHost
from services.common.status import from_rpc_error
from services.inference.service import InferenceService
from services.inference.servicer import SERVICE
from services.inference.settings import InferenceSettings
from services.registry.service import SERVICES, Registry
from tests.support.registry import Client, Place, sha256

if TYPE_CHECKING:
    from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub

BASE_NAME = "tiny"
TENANT = "acme"
CHUNK_BYTES = 64 * 1024
READY_SECONDS = 30.0


@dataclass
class Answer:
    """What a stream said about one completion."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[messages.PositionLogprobs] = field(default_factory=list)
    finished: messages.Finished | None = None


@dataclass
class Stream:
    """A whole stream: its first message and each completion's part."""

    started: messages.Started
    answers: dict[int, Answer]

    @property
    def tokens(self) -> list[int]:
        """The tokens of the only completion."""
        (answer,) = self.answers.values()
        return answer.token_ids

    @property
    def only(self) -> Answer:
        """The only completion."""
        (answer,) = self.answers.values()
        return answer


class InferenceClient:
    """The inference service as one tenant sees it; errors come as `LorafleetError`."""

    def __init__(self, stub: InferenceServiceAsyncStub, tenant: str = TENANT) -> None:
        self.tenant = tenant
        self.stub = stub

    async def call(self, method: Any, request: Any) -> Any:
        """Make a call with one answer."""
        try:
            with call_scope(tenant=self.tenant):
                return await method(request, timeout=30)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def generate(self, request: messages.GenerateRequest) -> Stream:
        """Read a generation to its end and check the order of its messages."""
        started: list[messages.Started] = []
        answers: dict[int, Answer] = {}
        try:
            with call_scope(tenant=self.tenant):
                async for response in self.stub.Generate(request, timeout=60):
                    take(response, started, answers)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        assert all(answer.finished is not None for answer in answers.values())
        return Stream(started[0], answers)

    async def status(self) -> calls.EngineStatus:
        """Return the engine's status."""
        result: calls.EngineStatus = await self.call(self.stub.GetStatus, calls.GetStatusRequest())
        return result

    async def residents(self) -> dict[str, calls.ResidentAdapter]:
        """Return the adapters on any tier by their `name:3`."""
        listed = await self.call(self.stub.ListResident, calls.ListResidentRequest())
        return {adapter.version_ref: adapter for adapter in listed.adapters}

    async def until(self, condition: Callable[[calls.EngineStatus], bool]) -> calls.EngineStatus:
        """Wait until the status is as wanted, and return it."""
        deadline = time.monotonic() + 5
        while not condition(status := await self.status()):
            assert time.monotonic() < deadline, status
            await asyncio.sleep(0.005)
        return status

    async def idle(self) -> calls.EngineStatus:
        """Wait until nothing runs and nothing is held, and return the status then."""
        deadline = time.monotonic() + 5
        while True:
            status = await self.status()
            leases = sum(adapter.leases for adapter in (await self.residents()).values())
            busy = status.running or status.queued or status.waiting_for_adapter
            if not (busy or leases) and status.free_kv_blocks == status.total_kv_blocks:
                return status
            assert time.monotonic() < deadline, f"{leases} leases are held, and {status}"
            await asyncio.sleep(0.01)


def take(
    response: messages.GenerateResponse, started: list[messages.Started], answers: dict[int, Answer]
) -> None:
    """Add one message of a stream to what came before it."""
    match response.WhichOneof("event"):
        case "started":
            assert not started, "a stream starts once"
            started.append(response.started)
        case "delta":
            assert started, "nothing comes before Started"
            answer = answers.setdefault(response.delta.index, Answer())
            assert answer.finished is None, "nothing comes after Finished"
            answer.text += response.delta.text
            answer.token_ids += response.delta.token_ids
            answer.logprobs += response.delta.logprobs
        case "finished":
            answer = answers.setdefault(response.finished.index, Answer())
            assert answer.finished is None, "a completion ends once"
            answer.finished = response.finished
        case None:
            raise AssertionError("an empty message")


def request(prompt: str = "Hello", adapter: str | None = None, **sampling: Any) -> messages.GenerateRequest:
    """Return a greedy request of at most 12 tokens unless told otherwise."""
    chosen: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, **sampling}
    model = messages.ModelRef(base=True) if adapter is None else messages.ModelRef(adapter=adapter)
    return messages.GenerateRequest(model=model, text=prompt, sampling=messages.SamplingParams(**chosen))


async def publish(
    registry: Client, adapter: str, folder: Path, base_digest: str
) -> adapter_pb2.AdapterVersion:
    """Publish a PEFT folder as the next version of `adapter`."""
    files = {
        name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    header = adapter_pb2.PublishVersionHeader(
        adapter=adapter,
        base_fingerprint_digest=base_digest,
        files=[
            adapter_pb2.AdapterFile(name=name, digest=sha256(data), size_bytes=len(data))
            for name, data in files.items()
        ],
    )

    def requests() -> Iterator[adapter_pb2.PublishVersionRequest]:
        yield adapter_pb2.PublishVersionRequest(header=header)
        for name, data in files.items():
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = adapter_pb2.FileChunk(file=name, data=data[start : start + CHUNK_BYTES])
                yield adapter_pb2.PublishVersionRequest(chunk=chunk)

    version: adapter_pb2.AdapterVersion = await registry.call(registry.adapters.PublishVersion, requests())
    return version


@dataclass
class Fleet:
    """A registry and an inference service under test."""

    client: InferenceClient
    registry: Client
    registry_address: str
    host: ServiceHost
    address: str
    base_digest: str
    stop_registry: Any

    def as_tenant(self, tenant: str) -> InferenceClient:
        """Return a client of another tenant."""
        return InferenceClient(self.client.stub, tenant)

    async def publish(self, adapters: Mapping[str, Path]) -> dict[str, adapter_pb2.AdapterVersion]:
        """Publish each folder under its name."""
        return {
            name: await publish(self.registry, name, folder, self.base_digest)
            for name, folder in adapters.items()
        }


@asynccontextmanager
async def running_registry(place: Place, **changes: Any) -> AsyncIterator[tuple[str, Any]]:
    """Run a registry; yield its address and what stops it early."""
    settings = place.settings(**changes)
    host = ServiceHost(settings, SERVICES)
    registry = Registry(settings)
    await registry.register(host)
    await registry.probe()
    address = await host.start()
    stopped = False

    async def stop() -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            await host.stop(grace_seconds=0)

    try:
        yield str(address), stop
    finally:
        await stop()


def settings_for(base: Path, cache: Path, registry_address: str, **changes: Any) -> InferenceSettings:
    """Return settings of a small float32 service on the CPU."""
    values: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "base_name": BASE_NAME,
        "base_path": base,
        "adapter_cache_path": cache,
        "registry_target": registry_address,
        "quantization": "none",
        "compute_dtype": "float32",
        "device": "cpu",
        "cpu_threads": 1,
        "kv_bytes": 8 << 20,
        "block_size": 4,
        "max_batch_tokens": 256,
        "max_num_seqs": 32,
    }
    return InferenceSettings(**(values | changes))


@asynccontextmanager
async def running_inference(settings: InferenceSettings) -> AsyncIterator[tuple[ServiceHost, str]]:
    """Run an inference service in this process; yield it as soon as it listens."""
    others = set(threading.enumerate())
    host = ServiceHost(settings, [SERVICE])
    service = InferenceService(settings)
    await service.register(host)
    address = await host.start()
    try:
        yield host, str(address)
    finally:
        await host.stop(grace_seconds=0)
        left = [thread for thread in set(threading.enumerate()) - others if thread.name == "engine"]
        assert not left, "the engine's thread outlives its service"


@asynccontextmanager
async def running_fleet(base: Path, folder: Path, redis_url: str, /, **changes: Any) -> AsyncIterator[Fleet]:
    """Run both; yield them once inference serves."""
    async with AsyncExitStack() as stack:
        place = Place.in_directory(redis_url, folder / "store")
        registry_address, stop_registry = await stack.enter_async_context(running_registry(place))
        settings = settings_for(base, folder / "cache", registry_address, **changes)
        host, address = await stack.enter_async_context(running_inference(settings))
        channel = await stack.enter_async_context(open_channel(address))
        registry_channel = await stack.enter_async_context(open_channel(registry_address))
        client = InferenceClient(InferenceServiceStub(channel))
        base_digest = await until_served(client)
        yield Fleet(
            client,
            Client(registry_channel, TENANT),
            registry_address,
            host,
            address,
            base_digest,
            stop_registry,
        )


async def until_served(client: InferenceClient) -> str:
    """Wait until calls are let in; return the base's fingerprint digest."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            with call_scope(tenant=client.tenant):
                status = await client.stub.GetStatus(calls.GetStatusRequest(), timeout=5)
            return str(status.base_fingerprint_digest)
        except grpc.aio.AioRpcError as error:
            if from_rpc_error(error).reason != "base_loading":
                raise
        assert time.monotonic() < deadline, "the service does not become ready"
        await asyncio.sleep(0.02)


async def health_of(address: str) -> str:
    """Return the health of the inference service at `address`."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def until_health(address: str, wanted: str) -> None:
    """Wait until the service at `address` is as wanted."""
    deadline = time.monotonic() + READY_SECONDS
    while await health_of(address) != wanted:
        assert time.monotonic() < deadline, f"the service does not become {wanted}"
        await asyncio.sleep(0.05)
