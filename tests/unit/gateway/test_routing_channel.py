"""Calls over several inference replicas on real ports: retries, refusals, breakers, joined answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import grpc
import pytest
import redis.asyncio
from pydantic import SecretStr

from lorafleet.inference.v1 import generation_pb2 as gen
from lorafleet.inference.v1 import inference_service_pb2 as inf
from lorafleet.inference.v1.inference_service_pb2_grpc import (
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceStub, add_AdapterServiceServicer_to_server
from services.common.call_context import call_scope
from services.common.channels import open_channel
from services.common.config import ServiceSettings
from services.common.errors import LorafleetError, NotFound, ResourceExhausted, Unavailable
from services.common.index_connection import open_index
from services.common.server import ServiceHost
from services.common.status import from_rpc_error
from services.gateway.routing import router as router_module
from services.gateway.routing.affinity import AdapterAffinity
from services.gateway.routing.channel import RoutedChannel
from services.gateway.routing.fleet import Fleet
from services.gateway.routing.hints import DigestHints
from services.gateway.routing.presence import PresenceReader
from services.gateway.routing.replica import Report
from services.gateway.routing.router import Router
from services.gateway.upstream import ADAPTER_SERVICE, INFERENCE_SERVICE
from tests.support.fake_adapters import FakeAdapters
from tests.support.fake_inference import FakeInference, Script

REFUSED_CONNECTION = "127.0.0.1:1"


@dataclass
class Setting:
    """Replicas by address, a stub over all of them, and what routes its calls."""

    replicas: dict[str, FakeInference]
    hosts: dict[str, ServiceHost]
    adapters: FakeAdapters
    fleet: Fleet
    stub: Any

    async def ask(self, adapter: str = "", text: str = "hi") -> list[gen.GenerateResponse]:
        model = gen.ModelRef(adapter=adapter) if adapter else gen.ModelRef(base=True)
        with call_scope(tenant="default"):
            call = self.stub.Generate(gen.GenerateRequest(model=model, text=text), timeout=10)
            return [response async for response in call]

    def script(self, text: str, script: Script, *addresses: str) -> None:
        for address in addresses or self.replicas:
            self.replicas[address].scripts[text] = script

    @property
    def asked(self) -> dict[str, int]:
        return {address: len(replica.requests) for address, replica in self.replicas.items()}


@asynccontextmanager
async def setting(count: int, *more_targets: str, patience_seconds: float = 0.0) -> AsyncIterator[Setting]:
    async with AsyncExitStack() as stack:
        adapters = FakeAdapters()  # type: ignore[abstract]
        registry = ServiceHost(ServiceSettings(), [ADAPTER_SERVICE])
        add_AdapterServiceServicer_to_server(adapters, registry.server)
        registry_address = str(await registry.start())
        stack.push_async_callback(registry.stop, grace_seconds=0)
        await registry.ready()
        replicas, hosts = {}, {}
        for _ in range(count):
            host = ServiceHost(ServiceSettings(), [INFERENCE_SERVICE])
            fake = FakeInference(adapters)  # type: ignore[abstract]
            add_InferenceServiceServicer_to_server(fake, host.server)
            address = str(await host.start())
            stack.push_async_callback(host.stop, grace_seconds=0)
            await host.ready()
            replicas[address], hosts[address] = fake, host
        fleet = Fleet([*replicas, *more_targets], open_channel, base="tiny")
        stack.push_async_callback(fleet.close)
        names = AdapterServiceStub(await stack.enter_async_context(open_channel(registry_address)))
        router = Router(fleet, AdapterAffinity(seed=1), patience_seconds=patience_seconds)
        channel = RoutedChannel(router, DigestHints(names))
        stub = InferenceServiceStub(cast(grpc.aio.Channel, channel))
        yield Setting(replicas, hosts, adapters, fleet, stub)


async def test_one_adapter_goes_to_one_replica_and_its_name_is_resolved_once() -> None:
    async with setting(3) as here:
        for number in range(6):
            here.adapters.publish(f"adapter-{number}")
        for number in range(6):
            before = here.asked
            for _ in range(4):
                await here.ask(f"adapter-{number}")
            gained = sorted(after - before[address] for address, after in here.asked.items())
            assert gained == [0, 0, 4]
        assert all(replica.load == 0 for replica in here.fleet.replicas)
        assert here.fleet.outstanding == 0


@pytest.mark.parametrize(
    "refusal",
    [
        ResourceExhausted("queue_full", "too many requests"),
        Unavailable("engine_stopping", "it stops"),
        Unavailable("base_loading", "it starts"),
    ],
    ids=lambda error: error.reason,
)
async def test_a_refusal_of_one_replica_moves_the_call(refusal: LorafleetError) -> None:
    async with setting(3) as here:
        here.adapters.publish("one")
        await here.ask("one")
        (home,) = (address for address, count in here.asked.items() if count)
        here.script("later", Script(refuse=refusal), home)
        answer = await here.ask("one", "later")
        assert answer[-1].WhichOneof("event") == "finished"
        assert here.asked[home] == 2
        assert sum(here.asked.values()) == 3


async def test_refusals_that_all_would_give_are_not_repeated() -> None:
    async with setting(3) as here:
        here.script("no", Script(refuse=NotFound("adapter_deleted", "gone", field="adapter")))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.ask(text="no")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        here.script("away", Script(refuse=Unavailable("adapter_unavailable", "the registry is away")))
        with pytest.raises(grpc.aio.AioRpcError):
            await here.ask(text="away")
        assert sum(here.asked.values()) == 2


async def test_attempts_are_counted() -> None:
    async with setting(5) as here:
        here.script("full", Script(refuse=ResourceExhausted("queue_full", "too many requests")))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.ask(text="full")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert sum(here.asked.values()) == 3


async def test_a_stream_that_has_begun_is_never_sent_again() -> None:
    async with setting(3) as here:
        here.script("breaks", Script(texts=["a"], fail=Unavailable("engine_stopping", "it stops")))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.ask(text="breaks")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert sum(here.asked.values()) == 1
        assert here.fleet.outstanding == 0


async def test_a_replica_that_nobody_reaches_is_left_alone_soon() -> None:
    async with setting(1, REFUSED_CONNECTION) as here:
        dead = here.fleet.replica(REFUSED_CONNECTION)
        for number in range(40):
            here.adapters.publish(f"adapter-{number}")
            assert (await here.ask(f"adapter-{number}"))[-1].WhichOneof("event") == "finished"
        assert dead.breaker.is_open
        assert here.fleet.outstanding == 0


async def test_with_all_breakers_open_calls_are_still_tried() -> None:
    async with setting(1) as here:
        (replica,) = here.fleet.replicas
        while not replica.breaker.is_open:
            here.script("stops", Script(refuse=Unavailable("engine_stopping", "it stops")))
            with pytest.raises(grpc.aio.AioRpcError):
                await here.ask(text="stops")
        assert (await here.ask())[-1].WhichOneof("event") == "finished"
        assert not replica.breaker.is_open, "an answer closes it"


async def test_a_cancelled_call_frees_its_replica() -> None:
    async with setting(2) as here:
        here.script("hangs", Script(hang=True))
        with call_scope(tenant="default"):
            request = gen.GenerateRequest(model=gen.ModelRef(base=True), text="hangs")
            call = here.stub.Generate(request, timeout=10)
            messages = aiter(call)
            await anext(messages)
            assert here.fleet.outstanding == 1
            call.cancel()
        for _ in range(200):
            if sum(replica.cancelled for replica in here.replicas.values()) and not here.fleet.outstanding:
                break
            await asyncio.sleep(0.02)
        assert here.fleet.outstanding == 0
        assert sum(replica.cancelled for replica in here.replicas.values()) == 1


async def test_what_all_replicas_hold_is_one_list() -> None:
    async with setting(3) as here:
        for number, replica in enumerate(here.replicas.values()):
            replica.resident = [inf.ResidentAdapter(version_ref=f"adapter:{number + 1}")]
        with call_scope(tenant="default"):
            listed = await here.stub.ListResident(inf.ListResidentRequest(), timeout=10)
        assert {item.version_ref for item in listed.adapters} == {"adapter:1", "adapter:2", "adapter:3"}


def _load(address: str, **changes: Any) -> str:
    fields = {
        "address": address,
        "base_model": "tiny",
        "draining": False,
        "running": 2,
        "queued": 1,
        "waiting_for_adapter": 1,
        "max_running": 8,
        "update_time_ms": 1,
        "kv_free_bytes": 5,
    }
    return json.dumps(fields | changes)


async def test_replicas_join_drain_and_go_as_redis_tells(redis_url: str) -> None:
    """The keys are those of docs/replica-keys.md."""
    async with redis.asyncio.Redis.from_url(redis_url) as client, setting(1) as here:
        reader = PresenceReader(open_index(SecretStr(redis_url)))
        (configured,) = here.fleet.members
        await client.zadd("inference:replicas", {"a": 1, "b": 2, "gone": 3, "foreign": 4, "broken": 5})
        await client.set("inference:replica:a", _load("127.0.0.1:5001"))
        await client.set("inference:replica:b", _load(configured, running=7))
        await client.set("inference:replica:foreign", _load("127.0.0.1:5002", base_model="other"))
        await client.set("inference:replica:broken", "{}")
        await client.hset("inference:replica:a:adapters", "sha256:1", "device")
        here.fleet.hear(await reader.read())
        assert set(here.fleet.members) == {configured, "127.0.0.1:5001"}
        assert here.fleet.load("127.0.0.1:5001") == 4
        assert here.fleet.load(configured) == 9
        assert here.fleet.outstanding == 13
        assert list(here.fleet.holders("sha256:1")) == ["127.0.0.1:5001"]

        await client.hset("inference:replica:a:adapters", "sha256:2", "host")
        await client.set("inference:replica:a", _load("127.0.0.1:5001", update_time_ms=2))
        here.fleet.hear(await reader.read())
        assert list(here.fleet.holders("sha256:2")) == ["127.0.0.1:5001"]

        await client.set("inference:replica:a", _load("127.0.0.1:5001", draining=True, update_time_ms=3))
        here.fleet.hear(await reader.read())
        assert list(here.fleet.members) == [configured]
        assert not here.fleet.holders("sha256:1")

        await client.delete("inference:replica:a", "inference:replica:b")
        here.fleet.hear(await reader.read())
        assert [replica.address for replica in here.fleet.replicas] == [configured]
        assert here.fleet.load(configured) == 0
        await reader.close()


async def test_a_call_waits_for_a_replica_that_comes_back() -> None:
    async with setting(0, REFUSED_CONNECTION, patience_seconds=30) as here:
        calls = [asyncio.create_task(here.ask()) for _ in range(3)]
        await asyncio.sleep(0.5)
        assert not any(call.done() for call in calls)
        host, fake = ServiceHost(ServiceSettings(), [INFERENCE_SERVICE]), FakeInference(here.adapters)  # type: ignore[abstract]
        add_InferenceServiceServicer_to_server(fake, host.server)
        address = str(await host.start())
        here.fleet.hear([Report("one", address, "tiny", False, 0, 4, frozenset(), 1)])
        for call in calls:
            assert (await call)[-1].WhichOneof("event") == "finished"
        await host.stop(grace_seconds=0)


async def test_a_call_waits_while_a_replica_loads_its_base_and_no_longer_than_it_may() -> None:
    async with setting(1, patience_seconds=1.0) as here:
        here.script("soon", Script(refuse=Unavailable("base_loading", "it starts")))
        waiting = asyncio.create_task(here.ask(text="soon"))
        await asyncio.sleep(0.4)
        here.script("soon", Script())
        assert (await waiting)[-1].WhichOneof("event") == "finished"
        here.script("never", Script(refuse=Unavailable("base_loading", "it starts")))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.ask(text="never")
        assert from_rpc_error(caught.value).reason == "base_loading"
        # Those who come after that are told at once, as long as no replica answers.
        before = sum(here.asked.values())
        with pytest.raises(grpc.aio.AioRpcError):
            await here.ask(text="never")
        assert sum(here.asked.values()) == before + 1
        await here.ask()
        before = sum(here.asked.values())
        with pytest.raises(grpc.aio.AioRpcError):
            await here.ask(text="never")
        assert sum(here.asked.values()) > before + 1
        # What the registry lacks, or a queue that is full, is said at once.
        for refusal in (
            Unavailable("adapter_unavailable", "the registry is away"),
            ResourceExhausted("queue_full", "too many requests"),
        ):
            here.script("no", Script(refuse=refusal))
            before = sum(here.asked.values())
            with pytest.raises(grpc.aio.AioRpcError):
                await here.ask(text="no")
            assert sum(here.asked.values()) == before + 1


async def test_only_so_many_calls_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "MAX_WAITING", 2)
    async with setting(1, patience_seconds=1.5) as here:
        here.script("never", Script(refuse=Unavailable("base_loading", "it starts")))
        calls = [asyncio.create_task(here.ask(text="never")) for _ in range(5)]
        done, waiting = await asyncio.wait(calls, timeout=0.9)
        assert (len(done), len(waiting)) == (3, 2)
        await asyncio.wait(waiting)
        for call in calls:
            assert isinstance(call.exception(), grpc.aio.AioRpcError)
