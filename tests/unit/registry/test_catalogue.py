"""The catalogue against a real Valkey: what happens when a caller leaves or the index is touched half way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from services.common.errors import LorafleetError
from services.common.index_connection import open_index
from services.common.store import DirectoryStore
from services.registry.catalogue import Catalogue
from services.registry.index import Index, tenant_key
from services.registry.journal import Journal
from services.registry.records import FileDeletion, FilePurpose, FileRecord
from services.registry.writer import Writer


class SlowStore(DirectoryStore):
    """A directory in which the records of tenants wait until they are let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.started = threading.Event()
        self.may_go_on = threading.Event()

    def put(self, key: str, data: object, *, if_absent: bool = False) -> None:
        if key.startswith("tenants/"):
            self.started.set()
            assert self.may_go_on.wait(10)
        super().put(key, data, if_absent=if_absent)  # type: ignore[arg-type]


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator[Redis]:
    client = open_index(SecretStr(redis_url))
    yield client
    await client.aclose()


def record(number: int) -> FileRecord:
    return FileRecord(
        "acme", f"file-{number:026d}", "f", FilePurpose.FINE_TUNE, 1, "sha256:" + "0" * 64, number
    )


def catalogue_of(store: DirectoryStore, redis: Redis) -> Catalogue:
    return Catalogue(store, Index(redis), Writer(store, redis))


async def ids(catalogue: Catalogue) -> list[bytes]:
    [found] = await catalogue.query(("HKEYS", tenant_key("acme", "files")))
    return sorted(found)


async def append(catalogue: Catalogue, number: int) -> None:
    async with catalogue.mutation() as mutation:
        await mutation.append(record(number))


async def test_a_writer_that_leaves_half_way_does_not_let_others_in(
    tmp_path: Path, redis_client: Redis
) -> None:
    store = SlowStore(tmp_path)
    catalogue = catalogue_of(store, redis_client)
    assert await ids(catalogue) == []
    first = asyncio.create_task(append(catalogue, 1))
    await asyncio.to_thread(store.started.wait)
    first.cancel()
    second = asyncio.create_task(append(catalogue, 2))
    await asyncio.sleep(0.1)
    assert not first.done()
    assert not second.done()
    store.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert await ids(catalogue) == [record(number).id.encode() for number in (1, 2)]
    assert Journal(store).count() == 2


async def test_a_failed_write_is_compared_with_the_store(
    tmp_path: Path, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = catalogue_of(DirectoryStore(tmp_path), redis_client)
    await append(catalogue, 1)
    put = DirectoryStore.put

    def put_then_fail(store: DirectoryStore, key: str, data: bytes) -> None:
        put(store, key, data)
        raise OSError("the answer was lost")

    monkeypatch.setattr(DirectoryStore, "put", put_then_fail)
    with pytest.raises(OSError, match="lost"):
        await append(catalogue, 2)
    monkeypatch.undo()
    assert len(await ids(catalogue)) == 2


async def test_rebuild_that_is_emptied_amid_starts_again(
    tmp_path: Path, redis_client: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryStore(tmp_path)
    journal = Journal(store)
    for number in range(5):
        journal.append(record(number))
    journal.append(FileDeletion("acme", record(0).id, 1))
    other = open_index(SecretStr(redis_url))
    flushes = 0
    original = redis_client.eval

    async def flush_first(*arguments: object) -> object:
        nonlocal flushes
        if flushes < 2:
            flushes += 1
            await other.flushall()
        return await original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(redis_client, "eval", flush_first)
    catalogue = catalogue_of(store, redis_client)
    assert len(await ids(catalogue)) == 4
    assert flushes == 2
    await other.aclose()


async def test_rebuild_gives_up_with_a_typed_error(
    tmp_path: Path, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def always_emptied(*_: object, **__: object) -> bool:
        return False

    monkeypatch.setattr(Index, "replace", always_emptied)
    Journal(DirectoryStore(tmp_path)).append(record(1))
    with pytest.raises(LorafleetError) as caught:
        await ids(catalogue_of(DirectoryStore(tmp_path), redis_client))
    assert caught.value.reason == "store_unavailable"


async def test_rebuild_leaves_other_keys_alone(tmp_path: Path, redis_client: Redis) -> None:
    await redis_client.set("gateway:key", "x")
    await redis_client.hset("registry:t:acme:files", "file-old", "{}")
    catalogue = catalogue_of(DirectoryStore(tmp_path), redis_client)
    assert await catalogue.rebuild() == 0
    assert await ids(catalogue) == []
    assert await redis_client.get("gateway:key") == b"x"


async def test_objects_that_are_not_records_do_not_count(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("tenants/acme/notes.txt", b"x")
    store.put("tenants/acme/adapters/a/versions/7-x.json", b"{}")
    store.put("other/x", b"x")
    assert Journal(store).count() == 0
    assert Journal(store).snapshot().records == ()


async def test_a_commit_does_not_revive_an_emptied_index(redis_client: Redis) -> None:
    index = Index(redis_client)
    assert await index.replace([], extra=[], num_records=0)
    assert await index.commit(record(1), num_records_before=0, writer="")
    assert not await index.commit(record(2), num_records_before=0, writer="")
    await redis_client.flushall()
    assert not await index.commit(record(2), num_records_before=1, writer="")
    assert await redis_client.keys("*") == []
