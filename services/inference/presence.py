"""What this replica holds and how busy it is, in Redis for whoever routes requests.

Keys (see docs/replica-keys.md): `inference:replicas`, the ids of replicas by when they were last heard of;
`inference:replica:ID`, the load as JSON; `inference:replica:ID:adapters`, the digests in memory, each with
its tier. The keys of a replica end by themselves when it is not heard of for `TTL_SECONDS`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from redis.asyncio import Redis

from services.common.errors import LorafleetError
from services.common.index_connection import index_errors

_logger = logging.getLogger("lorafleet.inference")

REPLICAS_KEY = "inference:replicas"
TTL_SECONDS = 10.0
_HEARTBEAT_SECONDS = 3.0
_INTERVAL_SECONDS = 0.25
_PAUSE_SECONDS = 1.0
# Ids of replicas that died are swept this long after.
_FORGOTTEN_SECONDS = 600.0

Load = Mapping[str, Any]


def load_key(replica_id: str) -> str:
    """Return the key of a replica's load."""
    return f"inference:replica:{replica_id}"


def adapters_key(replica_id: str) -> str:
    """Return the key of a replica's adapters."""
    return f"inference:replica:{replica_id}:adapters"


class Presence:
    """Publishes what changed, at most a few times a second, and all of it where the server has lost it."""

    def __init__(
        self,
        redis: Redis,
        replica_id: str,
        load: Callable[[], Load],
        adapters: Callable[[], Mapping[str, str]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Publish what `load` and `adapters` (digest to tier) return; both are cheap and never wait."""
        self._redis = redis
        self._id = replica_id
        self._load = load
        self._adapters = adapters
        self._clock = clock
        self._is_draining = False
        self._is_over = False
        self._told_load: Load | None = None
        self._told_adapters: dict[str, str] | None = None
        self._told_at = 0.0
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Publish until cancelled; then take the replica's keys away."""
        is_heard = True
        writing: asyncio.Future[None] | None = None
        try:
            while True:
                try:
                    # Never cut in the middle, which would leave a connection in an unknown state.
                    writing = asyncio.ensure_future(self.publish())
                    await asyncio.shield(writing)
                    is_heard = True
                    await asyncio.sleep(_INTERVAL_SECONDS)
                except LorafleetError as error:
                    if is_heard:
                        _logger.warning(
                            "routers cannot be told of this replica", extra={"detail": str(error)}
                        )
                    is_heard = False
                    self._told_adapters = None
                    await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            if writing is not None:
                await asyncio.gather(writing, return_exceptions=True)
            self._is_over = True
            await self._withdraw()
            await self._redis.aclose()

    async def drain(self) -> None:
        """Tell routers at once that this replica takes no new requests; nothing after `run` has ended."""
        self._is_draining = True
        if self._is_over:
            return
        try:
            await self.publish()
        except LorafleetError as error:
            _logger.warning("routers cannot be told that this replica drains", extra={"detail": str(error)})

    async def publish(self) -> None:
        """Write what has changed since the last time, or a sign of life where that is due.

        Raises:
            Unavailable: `store_unavailable`.
        """
        async with self._writing:
            load = {**self._load(), "draining": self._is_draining}
            adapters = dict(self._adapters())
            is_due = self._clock() - self._told_at >= _HEARTBEAT_SECONDS
            if load == self._told_load and adapters == self._told_adapters and not is_due:
                return
            known = await self._write(load, adapters, self._told_adapters)
            if known != len(adapters):
                # The server was emptied or restarted behind our back.
                await self._write(load, adapters, None)
            self._told_load, self._told_adapters, self._told_at = load, adapters, self._clock()

    async def _write(self, load: Load, adapters: dict[str, str], told: dict[str, str] | None) -> int:
        """Write the load and the difference between `told` and `adapters`, all of it where `told` is None;
        return how many adapters the server then knows.
        """
        key, ttl_ms, now_ms = adapters_key(self._id), int(TTL_SECONDS * 1000), time.time_ns() // 1_000_000
        changed: dict[Any, str] = {
            digest: tier for digest, tier in adapters.items() if (told or {}).get(digest) != tier
        }
        gone = (told or {}).keys() - adapters.keys()
        text = json.dumps({**load, "update_time_ms": now_ms}, sort_keys=True)
        with index_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.set(load_key(self._id), text, px=ttl_ms)
                pipe.zadd(REPLICAS_KEY, {self._id: now_ms})
                pipe.zremrangebyscore(REPLICAS_KEY, 0, now_ms - int(_FORGOTTEN_SECONDS * 1000))
                if told is None:
                    pipe.delete(key)
                if changed:
                    pipe.hset(key, mapping=changed)
                if gone:
                    pipe.hdel(key, *gone)
                pipe.pexpire(key, ttl_ms)
                pipe.hlen(key)
                *_, known = await pipe.execute()
        return int(known)

    async def _withdraw(self) -> None:
        try:
            with index_errors():
                async with self._redis.pipeline(transaction=True) as pipe:
                    pipe.delete(load_key(self._id), adapters_key(self._id))
                    pipe.zrem(REPLICAS_KEY, self._id)
                    await pipe.execute()
        except LorafleetError as error:
            _logger.warning("a replica's keys end by themselves", extra={"detail": str(error)})
