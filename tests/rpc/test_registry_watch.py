"""WatchAdapters: every event once and in order, across reconnections, restarts and a flushed index."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from lorafleet.registry.v1 import adapter_pb2
from services.common.status import from_rpc_error
from tests.support.registry import Client, Place, Upload, registry_client, running_registry
from tests.support.registry_fixtures import client, flush, local, place, s3_server

__all__ = ["client", "local", "place", "s3_server"]

READY = adapter_pb2.ADAPTER_EVENT_TYPE_VERSION_READY
DELETED = adapter_pb2.ADAPTER_EVENT_TYPE_VERSION_DELETED
MOVED = adapter_pb2.ADAPTER_EVENT_TYPE_ALIAS_MOVED
UNSET = adapter_pb2.ADAPTER_EVENT_TYPE_ALIAS_DELETED


class Watch:
    """An open watch of one tenant, and the token that it began with."""

    def __init__(self, call: Any, token: str) -> None:
        self._call = call
        self.token = token

    async def take(self, number: int) -> list[adapter_pb2.AdapterEvent]:
        """The next events."""
        events = [await asyncio.wait_for(self._call.read(), 20) for _ in range(number)]
        self.token = events[-1].resume_token
        return events

    async def error(self) -> str:
        """The reason that the watch ends with."""
        try:
            async with asyncio.timeout(20):
                await self._call.read()
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error).reason
        return "no error"


@asynccontextmanager
async def watching(client: Client, token: str = "") -> AsyncIterator[Watch]:
    request = adapter_pb2.WatchAdaptersRequest(resume_token=token)
    call: Any = client.adapters.WatchAdapters(request, metadata=(("lorafleet-tenant", client.tenant),))
    metadata = dict(await call.initial_metadata())
    yield Watch(call, metadata.get("lorafleet-resume-token", ""))
    call.cancel()


async def delete_version(client: Client, number: int) -> None:
    request = adapter_pb2.DeleteVersionRequest(adapter="billing", version=number)
    await client.call(client.adapters.DeleteVersion, request)


async def test_what_happens_is_told_in_order(client: Client) -> None:
    await client.publish(Upload.made(0))
    async with watching(client) as watch:
        await client.publish(Upload.made(1))
        await client.set_alias("prod", 2)
        await delete_version(client, 1)
        await client.call(
            client.adapters.DeleteAlias, adapter_pb2.DeleteAliasRequest(adapter="billing", alias="prod")
        )
        ready, moved, deleted, unset = await watch.take(4)
    assert [event.type for event in (ready, moved, deleted, unset)] == [READY, MOVED, DELETED, UNSET]
    assert (ready.version.version, deleted.version.version) == (2, 1)
    assert deleted.version.state == adapter_pb2.VERSION_STATE_DELETED
    assert (moved.alias.name, moved.alias.version) == ("prod", 2)
    assert (unset.alias.name, unset.alias.version) == ("prod", 0)
    assert not ready.HasField("alias")
    assert not moved.HasField("version")


async def test_a_watch_resumes_without_a_gap(place: Place) -> None:
    async with registry_client(place) as client:
        async with watching(client) as watch:
            token = watch.token
        await client.publish(Upload.made(0))
        async with watching(client, token) as watch:
            [first] = await watch.take(1)
            assert first.version.version == 1
            token = watch.token
        await client.publish(Upload.made(1))
        await client.set_alias("prod", 1)
        await flush(place)
        async with watching(client, token) as watch:
            events = await watch.take(2)
            assert [event.type for event in events] == [READY, MOVED]
            token = watch.token
        await client.publish(Upload.made(2))
    await flush(place)
    async with running_registry(place) as channel:
        client = Client(channel, "acme")
        async with watching(client, token) as watch:
            assert [event.version.version for event in await watch.take(1)] == [3]
            published = await client.publish(Upload.made(3))
            assert [event.version.digest for event in await watch.take(1)] == [published.digest]


async def test_row_42_a_watch_sees_its_own_tenant_only(client: Client) -> None:
    other = client.as_tenant("globex")
    async with watching(other) as watch, watching(client) as own:
        await client.publish(Upload.made(0))
        await other.publish(Upload.made(1), adapter="theirs")
        assert [event.version.adapter for event in await watch.take(1)] == ["theirs"]
        assert [event.version.adapter for event in await own.take(1)] == ["billing"]
        foreign = own.token
    async with watching(other, foreign) as watch:
        assert await watch.error() == "bad_page_token"


@pytest.mark.parametrize("token", ["x", "AAAA", "a" * 1000, "é"])
async def test_row_44_made_up_tokens_are_refused(client: Client, token: str) -> None:
    async with watching(client, token) as watch:
        assert await watch.error() == "bad_page_token"
