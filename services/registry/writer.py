"""Who may write: one registry process at a time, by a lease in the index and a fence in the store.

The lease keeps a second process waiting while the first is alive. A lease alone does not stop a process that
was paused past its end, so every writer takes a number above all before it, its epoch, and marks its records
with it: where two records claim the same place, the higher epoch holds it (`Journal.snapshot`). The epochs
lie in the store, so that they outlive the index, and so that two registries that share a store but not an
index notice each other: the newer one writes, the older one stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import time
from pathlib import Path

import psutil
from redis.asyncio import Redis

from services.common.errors import LorafleetError, Unavailable
from services.common.index_connection import index_errors
from services.common.store import ObjectStore

# Outside of the index's own keys, which a rebuild removes.
LEASE_KEY = "lease:registry:writer"
EPOCHS = "writers/"
LEASE_SECONDS = 15.0
RENEW_SECONDS = 3.0
# Reads go on that long while the lease is renewed behind them; it lasts longer.
READ_SECONDS = 10.0

_logger = logging.getLogger("lorafleet.registry")

_TAKE = """
local found = redis.call('GET', KEYS[1])
if found and found ~= ARGV[1] and found ~= ARGV[3] then return found end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ''
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class Writer:
    """This process's claim to be the one that writes; taken at first use, renewed in passing."""

    def __init__(self, store: ObjectStore, redis: Redis) -> None:
        self._store = store
        self._redis = redis
        self.token = _holder()
        self._epoch: int | None = None
        self._last_epoch: int | None = None
        self._renew_at = 0.0
        self._read_until = 0.0
        self._store_asked_again_at = 0.0
        self._renewal: asyncio.Task[None] | None = None
        self._is_superseded = False
        self._lock = asyncio.Lock()

    async def hold(self) -> int:
        """Return this writer's epoch; it changes when the lease was lost to another process in between.

        Raises:
            Unavailable: `not_the_writer`, while another process is, or for good once another has taken the
                store over; `store_unavailable`.
        """
        if self._epoch is not None and time.monotonic() < self._renew_at:
            return self._epoch
        async with self._lock:
            if self._epoch is None or time.monotonic() >= self._renew_at:
                try:
                    self._epoch = self._last_epoch = await self._renewed()
                except LorafleetError:
                    self._epoch = None
                    raise
            return self._epoch

    async def hold_for_reading(self) -> int:
        """As `hold`, but a renewal is not waited for while the lease lasts anyhow."""
        if self._epoch is None or time.monotonic() >= self._read_until:
            return await self.hold()
        if time.monotonic() >= self._renew_at and (self._renewal is None or self._renewal.done()):
            self._renewal = asyncio.create_task(self._renew())
        return self._epoch

    async def check_not_superseded(self) -> None:
        """Ask the store alone whether this is the last process that wrote; for reads without an index.

        Raises:
            Unavailable: `not_the_writer`, where it is not; `store_unavailable`.
        """
        assert self._last_epoch is not None, "there is nothing to read before the first epoch"
        if self._is_superseded:
            raise _superseded()
        if time.monotonic() >= self._store_asked_again_at:
            if await asyncio.to_thread(self._highest_epoch) > self._last_epoch:
                self._is_superseded = True
                raise _superseded()
            self._store_asked_again_at = time.monotonic() + RENEW_SECONDS

    async def release(self) -> None:
        """Let the next process in at once."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait([self._renewal])
        if self._epoch is not None:
            self._epoch = None
            with index_errors():
                await self._redis.eval(_RELEASE, 1, LEASE_KEY, self.token)

    async def _renew(self) -> None:
        # A caller that has to wait for it is told what is wrong.
        with contextlib.suppress(LorafleetError):
            await self.hold()

    async def _renewed(self) -> int:
        if self._is_superseded:
            raise _superseded()
        epoch = self._epoch
        started = time.monotonic()
        await self._take()
        if epoch is None:
            epoch = await asyncio.to_thread(self._new_epoch)
            _logger.info("writing", extra={"epoch": epoch})
        elif await asyncio.to_thread(self._highest_epoch) > epoch:
            self._is_superseded = True
            raise _superseded()
        self._renew_at, self._read_until = started + RENEW_SECONDS, started + READ_SECONDS
        return epoch

    async def _take(self) -> None:
        other = await self._try_to_take("")
        if other and _is_dead(other):
            other = await self._try_to_take(other)
        if other:
            raise Unavailable(
                "not_the_writer",
                "Another registry process serves this store; this one takes over when that one ends.",
                retry_after_seconds=RENEW_SECONDS,
                metadata={"pid": str(json.loads(other)["pid"])},
            )

    async def _try_to_take(self, dead: str) -> str:
        with index_errors():
            milliseconds = str(int(LEASE_SECONDS * 1000))
            found = await self._redis.eval(_TAKE, 1, LEASE_KEY, self.token, milliseconds, dead)
        return str(found.decode())

    def _new_epoch(self) -> int:
        earlier = [found.key for found in self._store.list(EPOCHS)]
        epoch = max(map(_epoch_of, earlier), default=0) + 1
        self._store.put(f"{EPOCHS}{epoch:012d}-{secrets.token_hex(8)}.json", self.token.encode())
        for key in earlier:
            self._store.delete(key)
        return epoch

    def _highest_epoch(self) -> int:
        return max((_epoch_of(found.key) for found in self._store.list(EPOCHS)), default=0)


def _epoch_of(key: str) -> int:
    return int(key.removeprefix(EPOCHS).partition("-")[0])


def _holder() -> str:
    """Name this process so that another one on the same machine can see whether it is still there."""
    return json.dumps(
        {
            "token": secrets.token_hex(16),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
        }
    )


def _machine() -> str:
    """One running system and one space of process ids in it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"


def _is_dead(holder: str) -> bool:
    """Whether the holder was a process of this machine that is gone; of others nothing can be said."""
    known = json.loads(holder)
    if known["machine"] != _machine():
        return False
    try:
        process = psutil.Process(known["pid"])
        return bool(process.status() == psutil.STATUS_ZOMBIE or process.create_time() != known["started"])
    except psutil.NoSuchProcess:
        return True


def _superseded() -> Unavailable:
    return Unavailable(
        "not_the_writer", "Another registry has taken this store over, by way of another index. Stop one."
    )
