"""Aliases and deletions through the real registry."""

from __future__ import annotations

import asyncio

import pytest

from lorafleet.registry.v1 import adapter_pb2
from services.common.errors import Code, LorafleetError
from tests.support.registry import (
    Client,
    Upload,
    reason_of,
)
from tests.support.registry_fixtures import WEIGHTS, client, local

__all__ = ["client", "local"]


async def test_alias_compare_and_set(client: Client) -> None:
    for seed in range(3):
        await client.publish(Upload.made(seed))
    assert (await client.set_alias("prod", 1, expected=0)).generation == 1
    with pytest.raises(LorafleetError) as caught:
        await client.set_alias("prod", 2, expected=0)
    assert (caught.value.code, caught.value.reason, caught.value.final) == (
        Code.ABORTED,
        "alias_conflict",
        True,
    )
    assert caught.value.metadata["generation"] == "1"
    assert (await client.set_alias("prod", 2, expected=1)).generation == 2
    assert (await client.set_alias("prod", 3)).generation == 3
    assert (await client.resolve("billing@prod")).version == 3
    outcomes = await asyncio.gather(
        *(reason_of(client.set_alias("prod", 1 + number % 3, expected=3)) for number in range(8))
    )
    assert sorted(outcomes) == ["alias_conflict"] * 7 + ["no error"]


async def test_alias_history_rollback_and_delete(client: Client) -> None:
    stub = client.adapters
    for seed in range(2):
        await client.publish(Upload.made(seed))
    rollback = adapter_pb2.RollbackAliasRequest(adapter="billing", alias="prod")
    delete = adapter_pb2.DeleteAliasRequest(adapter="billing", alias="prod")
    assert await reason_of(client.call(stub.RollbackAlias, rollback)) == "alias_not_found"
    await client.set_alias("prod", 1)
    assert await reason_of(client.call(stub.RollbackAlias, rollback)) == "no_previous_version"
    await client.set_alias("prod", 2)
    moved = await client.call(stub.RollbackAlias, rollback)
    assert (moved.version, moved.generation) == (1, 3)
    await client.call(stub.DeleteAlias, delete)
    assert await reason_of(client.resolve("billing@prod")) == "alias_not_found"
    assert await reason_of(client.call(stub.DeleteAlias, delete)) == "alias_not_found"
    assert (await client.set_alias("prod", 2, expected=0)).generation == 5
    seen: list[tuple[int, int]] = []
    token = ""
    while True:
        request = adapter_pb2.ListAliasHistoryRequest(
            adapter="billing", alias="prod", page_size=2, page_token=token
        )
        page = await client.call(stub.ListAliasHistory, request)
        assert len(page.moves) <= 2
        seen += [(move.generation, move.version) for move in page.moves]
        token = page.next_page_token
        if not token:
            break
    assert seen == [(5, 2), (4, 0), (3, 1), (2, 2), (1, 1)]


async def test_bad_aliases(client: Client) -> None:
    await client.publish(Upload.made(0))
    for alias in ("", "Prod", "1a", "a b", "sha256:x", "x" * 33, "a-"):
        assert await reason_of(client.set_alias(alias, 1)) == "bad_alias", alias
    assert await reason_of(client.set_alias("prod", 2)) == "version_not_found"
    assert await reason_of(client.set_alias("prod", 0)) == "version_not_found"
    assert await reason_of(client.set_alias("prod", 1, adapter="nobody")) == "adapter_not_found"
    for ref in (
        "",
        "Billing",
        "billing:",
        "billing:0",
        "billing:01",
        "billing@",
        "billing@sha256:1",
        "a:1:2",
    ):
        assert (await reason_of(client.resolve(ref))).startswith("bad_"), ref


async def test_deleted_versions(client: Client) -> None:
    stub = client.adapters
    for seed in range(2):
        await client.publish(Upload.made(seed))
    await client.set_alias("prod", 2)
    delete = adapter_pb2.DeleteVersionRequest(adapter="billing", version=2)
    deleted = await client.call(stub.DeleteVersion, delete)
    assert deleted.state == adapter_pb2.VERSION_STATE_DELETED
    assert deleted.HasField("delete_time")
    assert await client.call(stub.DeleteVersion, delete) == deleted
    for ref in ("billing:2", "billing@prod", f"billing@{deleted.digest}"):
        assert await reason_of(client.resolve(ref)) == "adapter_deleted"
        assert await reason_of(client.download(ref, WEIGHTS)) == "adapter_deleted"
    assert await reason_of(client.set_alias("canary", 2)) == "adapter_deleted"
    assert (await client.resolve("billing")).version == 1
    assert (await client.publish(Upload.made(2))).version == 3
    await client.call(stub.DeleteAdapter, adapter_pb2.DeleteAdapterRequest(adapter="billing"))
    assert await reason_of(client.resolve("billing")) == "adapter_deleted"
    assert await reason_of(client.resolve("billing@prod")) == "alias_not_found"
    overview = await client.call(stub.GetAdapter, adapter_pb2.GetAdapterRequest(adapter="billing"))
    assert (overview.num_versions, overview.HasField("latest_version")) == (0, False)
    assert (await client.publish(Upload.made(3))).version == 4
