"""The index in Redis or Valkey: everything that is listed and looked up, and nothing that cannot be rebuilt.

Layout, with `<a>` for `t:<tenant>:a:<adapter>`:

    registry:state:2                    hash: records = how many records the index holds; 2 is this layout
    registry:bases                      hash: name -> record
    registry:base_digests               hash: fingerprint digest -> name of the first base with it
    registry:t:<tenant>:adapters        sorted set of names, in the order of letters
    registry:<a>:facts                  hash: created_ms, highest_version
    registry:<a>:versions               hash: number -> record
    registry:<a>:live                   sorted set of the numbers that are not deleted
    registry:<a>:deletions              hash: number -> time of deletion
    registry:<a>:digests                hash: version digest -> the newest number with it
    registry:<a>:aliases                hash: alias -> its last move, which may be a deletion
    registry:<a>:moves:<alias>          sorted set of moves by generation
    registry:t:<tenant>:publishes       hash: idempotency key -> adapter, number and content digest
    registry:t:<tenant>:digests         hash: version digest -> the newest [adapter, number] with it
    registry:t:<tenant>:version_bytes   hash: [adapter, number] -> size of its files, unless deleted
    registry:t:<tenant>:events          sorted set of what can be watched, by sequence
    registry:t:<tenant>:files           hash: id -> record
    registry:t:<tenant>:file_bytes      hash: id -> size
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from redis.asyncio import Redis

from services.common.errors import Unavailable
from services.common.index_connection import index_errors
from services.registry.events import EVENTS, EventRow
from services.registry.records import (
    ALIAS_MOVES,
    BASES,
    FILES,
    VERSIONS,
    AliasMove,
    BaseRecord,
    Event,
    FileDeletion,
    FileRecord,
    Record,
    VersionDeletion,
    VersionRecord,
)
from services.registry.writer import LEASE_KEY

PREFIX = "registry:"
STATE = PREFIX + "state:2"
_REBUILD = PREFIX + "rebuild"
_BATCH = 500

Command = tuple[str | int | bytes, ...]

# A commit into an index that was emptied in between must not make it look alive.
_COMMIT = """
if redis.call('HGET', KEYS[1], 'records') ~= ARGV[1] then return 0 end
local writer = redis.call('GET', KEYS[2])
if writer and writer ~= ARGV[3] then return -1 end
for _, command in ipairs(cjson.decode(ARGV[2])) do redis.call(unpack(command)) end
redis.call('HINCRBY', KEYS[1], 'records', 1)
return 1
"""
_FINISH = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[1], 'records', ARGV[2])
return 1
"""


class Index:
    """Commands against the index, each answer checked against the number of records that it should hold."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def num_records(self) -> int | None:
        """Return how many records the index holds; None where there is no index."""
        with index_errors():
            found = await self._redis.hget(STATE, "records")
        return None if found is None else int(found)

    async def query(self, commands: Sequence[Command]) -> tuple[int | None, list[Any]]:
        """Run reads as one transaction; return how many records the index held then, and the answers."""
        with index_errors():
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.hget(STATE, "records")
                for command in commands:
                    pipeline.execute_command(*command)
                state, *answers = await pipeline.execute()
        return (None if state is None else int(state)), answers

    async def commit(self, record: Record, *, num_records_before: int, writer: str) -> bool:
        """Add one record; return False, with nothing done, where the index holds another number of them.

        Raises:
            Unavailable: `not_the_writer`, where another process than `writer` has the lease by now.
        """
        commands = json.dumps([[_text(part) for part in command] for command in commands_for(record)])
        with index_errors():
            done = await self._redis.eval(
                _COMMIT, 2, STATE, LEASE_KEY, str(num_records_before), commands, writer
            )
        if done == -1:
            raise Unavailable("not_the_writer", "Another registry process has taken over meanwhile.")
        return bool(done)

    async def replace(self, records: Iterable[Record], *, extra: Iterable[Command], num_records: int) -> bool:
        """Empty the index and fill it anew; return False where it was emptied by somebody else meanwhile."""
        token = secrets.token_hex(16)
        with index_errors():
            await self._redis.delete(STATE)
            async for batch in self._own_keys():
                await self._redis.unlink(*batch)
            await self._redis.set(_REBUILD, token)
            commands = [command for record in records for command in commands_for(record)]
            for batch_commands in _batches([*commands, *extra]):
                async with self._redis.pipeline(transaction=False) as pipeline:
                    for command in batch_commands:
                        pipeline.execute_command(*command)
                    await pipeline.execute()
            done = await self._redis.eval(_FINISH, 2, STATE, _REBUILD, token, str(num_records))
        return bool(done)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _own_keys(self) -> Any:
        batch: list[bytes] = []
        async for key in self._redis.scan_iter(match=PREFIX + "*", count=_BATCH):
            batch.append(key)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def tenant_key(tenant: str, what: str) -> str:
    """The key of something that belongs to a tenant."""
    return f"{PREFIX}t:{tenant}:{what}"


def adapter_key(tenant: str, adapter: str, what: str) -> str:
    """The key of something that belongs to an adapter."""
    return f"{PREFIX}t:{tenant}:a:{adapter}:{what}"


def commands_for(record: Record) -> Iterator[Command]:
    """Yield the writes that add `record`: the same for a fresh one and in a rebuild."""
    match record:
        case BaseRecord():
            yield ("HSETNX", PREFIX + "bases", record.name, BASES.encode(record))
            yield ("HSETNX", PREFIX + "base_digests", record.fingerprint.digest, record.name)
        case VersionRecord():
            yield from _version_commands(record)
        case VersionDeletion():
            number = record.version
            yield ("ZREM", adapter_key(record.tenant, record.adapter, "live"), number)
            deletions = adapter_key(record.tenant, record.adapter, "deletions")
            yield ("HSETNX", deletions, number, record.delete_time_ms)
            sizes = tenant_key(record.tenant, "version_bytes")
            yield ("HDEL", sizes, version_field(record.adapter, number))
            yield from _event_commands(record)
        case AliasMove():
            move = ALIAS_MOVES.encode(record)
            yield ("HSET", adapter_key(record.tenant, record.adapter, "aliases"), record.alias, move)
            moves = adapter_key(record.tenant, record.adapter, f"moves:{record.alias}")
            yield ("ZADD", moves, record.generation, move)
            yield from _event_commands(record)
        case FileRecord():
            yield ("HSET", tenant_key(record.tenant, "files"), record.id, FILES.encode(record))
            yield ("HSET", tenant_key(record.tenant, "file_bytes"), record.id, record.size_bytes)
        case FileDeletion():
            yield ("HDEL", tenant_key(record.tenant, "files"), record.id)
            yield ("HDEL", tenant_key(record.tenant, "file_bytes"), record.id)


def highest_version_command(tenant: str, adapter: str, version: int) -> Command:
    """The write that keeps every number up to `version` from being given again."""
    return ("HSET", adapter_key(tenant, adapter, "facts"), "highest_version", version)


def version_field(adapter: str, number: int) -> str:
    """How a tenant's hashes name a version."""
    return json.dumps([adapter, number])


def _event_commands(record: Event) -> Iterator[Command]:
    if record.sequence:
        events = tenant_key(record.tenant, "events")
        yield ("ZADD", events, record.sequence, EVENTS.encode(EventRow.of(record)))


def _version_commands(record: VersionRecord) -> Iterator[Command]:
    tenant, adapter, number = record.tenant, record.adapter, record.version
    yield ("ZADD", tenant_key(tenant, "adapters"), 0, adapter)
    yield ("HSETNX", adapter_key(tenant, adapter, "facts"), "created_ms", record.create_time_ms)
    yield highest_version_command(tenant, adapter, number)
    yield ("HSET", adapter_key(tenant, adapter, "versions"), number, VERSIONS.encode(record))
    yield ("ZADD", adapter_key(tenant, adapter, "live"), number, number)
    yield ("HSET", adapter_key(tenant, adapter, "digests"), record.digest, number)
    field = version_field(adapter, number)
    yield ("HSET", tenant_key(tenant, "digests"), record.digest, field)
    yield ("HSET", tenant_key(tenant, "version_bytes"), field, record.size_bytes)
    yield from _event_commands(record)
    if record.idempotency_key:
        result = json.dumps({"adapter": adapter, "version": number, "content": record.content_digest})
        yield ("HSETNX", tenant_key(tenant, "publishes"), record.idempotency_key, result)


def _text(part: str | int | bytes) -> str:
    return part.decode("utf-8") if isinstance(part, bytes) else str(part)


def _batches(commands: list[Command]) -> Iterator[list[Command]]:
    for start in range(0, len(commands), _BATCH):
        yield commands[start : start + _BATCH]
