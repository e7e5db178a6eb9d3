"""One gateway before several real inference services: where requests go, and what a lost replica costs."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from lorafleet.inference.v1 import inference_service_pb2 as calls
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.call_context import call_scope
from services.common.channels import open_channel
from services.common.server import ServiceHost
from tests.rpc.test_inference_process import inference_process
from tests.support.gateway import GatewayUnderTest, running_gateway
from tests.support.inference import (
    BASE_NAME,
    TENANT,
    InferenceClient,
    publish,
    running_inference,
    running_registry,
    settings_for,
    until_health,
    until_served,
)
from tests.support.models import make_peft_adapter, make_tiny_llama
from tests.support.registry import Client, Place

ADAPTERS = ("one", "two", "three", "four")
WAIT_SECONDS = 30.0
START_SECONDS = 120.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_peft_adapter(base, root / name, r=4, seed=seed) for seed, name in enumerate(ADAPTERS)}


@dataclass
class Replicas:
    """Inference services by their addresses, and a gateway's client in front of them."""

    clients: dict[str, InferenceClient]
    hosts: dict[str, ServiceHost]
    http: httpx.AsyncClient

    async def complete(self, model: str, **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": "Once", "max_tokens": 4, "temperature": 0, **more}
        return await self.http.post("/v1/completions", json=body)

    async def holders(self, adapter: str) -> list[str]:
        """Return the replicas that hold version 1 of the adapter."""
        found = await asyncio.gather(*(client.residents() for client in self.clients.values()))
        return [address for address, held in zip(self.clients, found, strict=True) if f"{adapter}:1" in held]


@asynccontextmanager
async def gateway_before(
    clients: dict[str, InferenceClient], hosts: dict[str, ServiceHost], folder: Path, **settings: Any
) -> AsyncIterator[Replicas]:
    with running_gateway(folder / "gateway", **settings) as gateway:
        async with _http(gateway) as http:
            yield Replicas(clients, hosts, http)


def _http(gateway: GatewayUnderTest) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {gateway.new_key(TENANT)}"}
    return httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=WAIT_SECONDS)


async def publish_all(registry: str, adapters: Mapping[str, Path], digest: str) -> None:
    async with open_channel(registry) as channel:
        client = Client(channel, TENANT)
        for name, folder in adapters.items():
            await publish(client, name, folder, digest)


@asynccontextmanager
async def three_replicas(
    base: Path, adapters: Mapping[str, Path], folder: Path, redis_url: str
) -> AsyncIterator[Replicas]:
    """Run them and a gateway that finds them in Redis by their base."""
    async with AsyncExitStack() as stack:
        place = Place.in_directory(redis_url, folder / "store")
        registry, _ = await stack.enter_async_context(running_registry(place))
        clients, hosts = {}, {}
        for number in range(3):
            settings = settings_for(
                base, folder / f"cache-{number}", registry, redis_url=SecretStr(redis_url), max_num_seqs=16
            )
            host, address = await stack.enter_async_context(running_inference(settings))
            channel = await stack.enter_async_context(open_channel(address))
            clients[address], hosts[address] = InferenceClient(InferenceServiceStub(channel)), host
            digest = await until_served(clients[address])
        await publish_all(registry, adapters, digest)
        replicas = await stack.enter_async_context(
            gateway_before(
                clients,
                hosts,
                folder,
                registry_target=registry,
                redis_url=SecretStr(redis_url),
                inference_target="",
                inference_base=BASE_NAME,
            )
        )
        await until_async(lambda: _all_take_part(replicas))
        yield replicas


async def _all_take_part(replicas: Replicas) -> bool:
    """Whether requests for the base reach every replica."""
    answers = await asyncio.gather(*(replicas.complete(BASE_NAME) for _ in range(6)))
    statuses = [await client.status() for client in replicas.clients.values()]
    return all(answer.status_code == 200 for answer in answers) and all(
        status.generated_tokens for status in statuses
    )


async def until_async(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        await asyncio.sleep(0.1)


async def test_adapters_stay_where_they_are_until_their_replica_drains(
    base: Path, adapters: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    async with three_replicas(base, adapters, tmp_path, redis_url) as replicas:
        for name in ("one", "two", "three"):
            for _ in range(3):
                answer = await replicas.complete(name)
                assert answer.status_code == 200, answer.text
            assert len(await replicas.holders(name)) == 1

        crowd = await asyncio.gather(*(replicas.complete("four") for _ in range(12)))
        assert {answer.status_code for answer in crowd} == {200}
        assert len(await replicas.holders("four")) == 1, "a crowd on a cold adapter makes one load"

        listed = (await replicas.http.get("/v1/adapters/resident")).json()["data"]
        assert {item["version_ref"] for item in listed} == {f"{name}:1" for name in ADAPTERS}

        (home,) = await replicas.holders("one")
        body = {"model": "one", "prompt": "Once", "max_tokens": 450, "stream": True}
        async with replicas.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            stopping = asyncio.create_task(replicas.hosts[home].stop(grace_seconds=20))
            del replicas.clients[home]

            async def is_elsewhere() -> bool:
                answer = await replicas.complete("one")
                assert answer.status_code == 200, answer.text
                return bool(await replicas.holders("one"))

            await until_async(is_elsewhere)
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]", "what had begun ends where it began"
        assert "error" not in rest[-2]
        await stopping


# Two processes load the engine's libraries at once, and one of them a second time.
@pytest.mark.timeout(240)
async def test_kill_of_a_replica_moves_what_has_not_begun_and_ends_what_has(
    base: Path, adapters: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    place = Place.in_directory(redis_url, tmp_path / "store")
    async with AsyncExitStack() as stack:
        registry, _ = await stack.enter_async_context(running_registry(place))
        started, processes, clients = [], {}, {}
        for number in range(2):
            folder = tmp_path / f"replica-{number}"
            folder.mkdir()
            started.append((folder, stack.enter_context(inference_on(base, folder, registry))))
        for folder, process in started:
            address = await listening(process, folder)
            processes[address] = (folder, process)
            channel = await stack.enter_async_context(open_channel(address))
            clients[address] = InferenceClient(InferenceServiceStub(channel))
        for address in clients:
            await until_health(address, "SERVING")
        digest = await until_served(clients[address])
        await publish_all(registry, adapters, digest)
        replicas = await stack.enter_async_context(
            gateway_before(
                clients, {}, tmp_path, registry_target=registry, inference_target=",".join(clients)
            )
        )
        assert (await replicas.complete("one")).status_code == 200
        (home,) = await replicas.holders("one")
        folder, process = processes[home]
        (other,) = set(clients) - {home}

        body = {"model": "one", "prompt": "Once", "max_tokens": 500, "stream": True}
        async with replicas.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            process.send_signal(signal.SIGSTOP)
            waiting = [asyncio.create_task(replicas.complete("one")) for _ in range(4)]
            await asyncio.sleep(0.5)
            assert not any(task.done() for task in waiting), "they wait on the replica that has stopped"
            process.kill()
            answers = await asyncio.gather(*waiting)
            assert [answer.status_code for answer in answers] == [200] * 4
            rest = [line.removeprefix("data: ") async for line in lines if line]
        assert json.loads(rest[-1])["error"]["type"] == "server_error", rest[-1]
        assert "[DONE]" not in rest
        assert await _tokens(clients[other]) >= 16

        # The breaker is open: nothing is tried there, so nothing is slow.
        began = time.monotonic()
        for _ in range(5):
            assert (await replicas.complete("one")).status_code == 200
        assert time.monotonic() - began < 5

        await asyncio.to_thread(process.wait)
        (folder / "port").unlink()
        again = stack.enter_context(inference_on(base, folder, registry, listen=home))
        assert await listening(again, folder) == home
        await until_health(home, "SERVING")

        async def is_back() -> bool:
            assert (await replicas.complete("one")).status_code == 200
            return await _tokens(clients[home]) > 0

        await until_async(is_back)


def inference_on(
    base: Path, folder: Path, registry: str, *, listen: str = "127.0.0.1:0"
) -> AbstractContextManager[subprocess.Popen[str]]:
    return inference_process(
        folder, registry, BASE_PATH=str(base), BASE_NAME=BASE_NAME, QUANTIZATION="none", LISTEN=listen
    )


async def listening(process: subprocess.Popen[str], folder: Path) -> str:
    """Wait until the process listens; return its address."""

    async def is_there() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return (folder / "port").exists()

    await until_async(is_there, seconds=START_SECONDS)
    return (folder / "port").read_text("ascii").strip()


async def _tokens(client: InferenceClient) -> int:
    with call_scope(tenant=client.tenant):
        status = await client.stub.GetStatus(calls.GetStatusRequest(), timeout=5, wait_for_ready=True)
    return int(status.generated_tokens)
