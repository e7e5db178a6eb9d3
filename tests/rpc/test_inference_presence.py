"""What replicas tell routers, in a real Valkey: the keys, their healing, and their end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from pydantic import SecretStr

from lorafleet.inference.v1 import inference_service_pb2 as calls
from services.common.errors import Unavailable
from services.common.ids import is_id
from services.common.index_connection import open_index
from services.common.valkey import EmbeddedValkey
from services.inference import presence
from services.inference.presence import REPLICAS_KEY, Presence, adapters_key, load_key
from tests.support.inference import Fleet, request, running_fleet
from tests.support.models import make_peft_adapter, make_tiny_llama

Redis = redis.asyncio.Redis


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_peft_adapter(base, root / name, r=4, seed=seed) for seed, name in enumerate(("one", "two"))
    }


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 10
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def the_replica(client: Redis) -> str:
    async def is_there() -> bool:
        return bool(await client.zcard(REPLICAS_KEY) == 1)

    await until(is_there)
    (found,) = await client.zrange(REPLICAS_KEY, 0, -1)
    return str(found)


async def load_of(client: Redis, replica_id: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(await client.get(load_key(replica_id)) or "")
    return fields


async def test_routers_see_load_and_residency_of_a_service(
    base: Path, adapters: dict[str, Path], tmp_path: Path, redis_url: str, redis_client: Redis
) -> None:
    settings = {"redis_url": SecretStr(redis_url)}
    async with running_fleet(base, tmp_path, redis_url, **settings) as fleet:
        versions = await fleet.publish(adapters)
        one, two = (versions[name].digest for name in ("one", "two"))
        replica = await the_replica(redis_client)
        assert is_id("replica", replica)
        load = await load_of(redis_client, replica)
        assert load["address"] == fleet.address
        assert load["base_fingerprint_digest"] == fleet.base_digest
        assert (load["running"], load["queued"], load["draining"]) == (0, 0, False)
        assert not await redis_client.exists(adapters_key(replica))

        running = asyncio.create_task(
            fleet.client.generate(request("Once", "one", max_tokens=450, ignore_eos=True))
        )
        await fleet.client.call(fleet.client.stub.Prefetch, calls.PrefetchRequest(adapter="two"))
        wanted = {one: "device", two: "host"}

        async def sees_both() -> bool:
            return bool(await redis_client.hgetall(adapters_key(replica)) == wanted)

        await until(sees_both)
        await running

        await redis_client.flushall()
        await until(sees_both)
        assert await the_replica(redis_client) == replica

        await fleet.client.call(fleet.client.stub.Evict, calls.EvictRequest(adapter="two"))

        async def sees_one() -> bool:
            return bool(await redis_client.hgetall(adapters_key(replica)) == {one: "device"})

        await until(sees_one)
        load = await load_of(redis_client, replica)
        assert load["device_free_bytes"] < load["host_free_bytes"] < 1 << 30
        assert 0 < await redis_client.pttl(load_key(replica)) <= presence.TTL_SECONDS * 1000
    # A replica that ends takes its keys along.
    assert await redis_client.keys("inference:*") == []


async def test_draining_replica_says_so(
    base: Path, adapters: dict[str, Path], tmp_path: Path, redis_url: str, redis_client: Redis
) -> None:
    settings = {"redis_url": SecretStr(redis_url), "advertised_address": "inference-1:7103"}
    async with running_fleet(base, tmp_path, redis_url, **settings) as fleet:
        await fleet.publish(adapters)
        replica = await the_replica(redis_client)
        assert (await load_of(redis_client, replica))["address"] == "inference-1:7103"
        running = asyncio.create_task(_long(fleet))
        await fleet.client.until(lambda status: status.running == 1)
        stopping = asyncio.create_task(fleet.host.stop(grace_seconds=10))

        async def is_draining() -> bool:
            return bool((await load_of(redis_client, replica))["draining"])

        await until(is_draining)
        assert len((await running).tokens) == 450
        await stopping


async def _long(fleet: Fleet) -> Any:
    return await fleet.client.generate(request("Once", "one", max_tokens=450, ignore_eos=True))


class Replica:
    """A replica in which a test sets what is told."""

    def __init__(self, redis_url: str) -> None:
        self.load: dict[str, Any] = {"running": 0}
        self.adapters: dict[str, str] = {}
        self.now = 100.0
        self.redis = open_index(SecretStr(redis_url))
        self.presence = Presence(
            self.redis, "replica-x", lambda: self.load, lambda: self.adapters, clock=lambda: self.now
        )


@pytest.fixture
async def replica(redis_url: str) -> AsyncIterator[Replica]:
    made = Replica(redis_url)
    yield made
    await made.redis.aclose()


async def test_only_differences_are_written_and_a_sign_of_life_now_and_then(
    replica: Replica, redis_client: Redis
) -> None:
    replica.adapters = {f"sha256:{number}": "host" for number in range(100)}
    await replica.presence.publish()

    async def bytes_of_one_publication() -> int:
        before = (await redis_client.info("stats"))["total_net_input_bytes"]
        await replica.presence.publish()
        return int((await redis_client.info("stats"))["total_net_input_bytes"]) - int(before)

    idle_bytes = await bytes_of_one_publication()
    assert idle_bytes < 100, "the INFO commands alone"
    replica.adapters |= {"sha256:7": "device"}
    del replica.adapters["sha256:8"]
    assert idle_bytes < await bytes_of_one_publication() < 1000
    wanted = replica.adapters
    assert await redis_client.hgetall(adapters_key("replica-x")) == wanted
    replica.now += 3.0
    assert await bytes_of_one_publication() > idle_bytes


@pytest.mark.parametrize("lost", ["all", "one adapter"])
async def test_what_the_server_lost_is_written_anew(replica: Replica, redis_client: Redis, lost: str) -> None:
    replica.adapters = {"sha256:1": "host", "sha256:2": "host"}
    await replica.presence.publish()
    if lost == "all":
        await redis_client.flushall()
    else:
        await redis_client.hdel(adapters_key("replica-x"), "sha256:1")
    # The change that comes next would write one of the two only.
    replica.adapters = {"sha256:1": "host", "sha256:2": "device"}
    await replica.presence.publish()
    assert await redis_client.hgetall(adapters_key("replica-x")) == replica.adapters


async def test_ids_of_the_dead_are_swept(replica: Replica, redis_client: Redis) -> None:
    await redis_client.zadd(REPLICAS_KEY, {"replica-dead": 1000})
    await replica.presence.publish()
    assert await redis_client.zrange(REPLICAS_KEY, 0, -1) == ["replica-x"]


async def test_server_that_is_away_is_no_harm_and_is_told_all_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "_PAUSE_SECONDS", 0.05)
    with EmbeddedValkey.start(tmp_path / "valkey") as server:
        replica = Replica(server.url)
        replica.adapters = {"sha256:1": "host"}
        work = asyncio.create_task(replica.presence.run())
        async with Redis.from_url(server.url, decode_responses=True) as client:

            async def is_told() -> bool:
                return bool(await client.hgetall(adapters_key("replica-x")) == replica.adapters)

            await until(is_told)
    replica.load = {"running": 1}
    with pytest.raises(Unavailable):
        await replica.presence.publish()
    await replica.presence.drain()
    assert not work.done()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
