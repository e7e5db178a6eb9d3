"""Leases on versions: while somebody holds one, garbage collection leaves the version's bytes alone.

Leases lie in the index and end by its clock. An index that is emptied loses them; the grace of garbage
collection is longer than any lease, so what was deleted under a lost lease is still there when it ends.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from redis.asyncio import Redis

from services.common import names
from services.common.errors import InvalidArgument, NotFound
from services.common.index_connection import index_errors
from services.registry.catalogue import Catalogue
from services.registry.config import MAX_LEASE_SECONDS
from services.registry.index import tenant_key
from services.registry.lookup import Lookup

MAX_HOLDER_CHARS = 128

# Outside of the index's own keys, which a rebuild removes.
_PREFIX = "lease:registry:version:"

_NOW = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
"""
_ACQUIRE = (
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if ARGV[3] == '0' and not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return '' end
local ends = string.format('%.0f', now + tonumber(ARGV[2]))
redis.call('ZADD', KEYS[1], ends, ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return ends
"""
)
_HELD = _NOW + "return redis.call('ZCOUNT', KEYS[1], string.format('(%.0f', now), '+inf')"


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease, and when it ends, in Unix milliseconds."""

    digest: str
    holder: str
    expire_time_ms: int


class Leases:
    """The leases of all tenants; each call acts for one."""

    def __init__(self, catalogue: Catalogue, lookup: Lookup, redis: Redis) -> None:
        self._catalogue = catalogue
        self._lookup = lookup
        self._redis = redis

    async def acquire(self, tenant: str, digest: str, holder: str, ttl_seconds: int) -> HeldLease:
        """Take a lease on the version `digest`, or renew the one that `holder` has.

        On a deleted version no new lease is given; those that are there can be renewed.

        Raises:
            InvalidArgument: `bad_digest`, `bad_holder` or `bad_ttl`.
            NotFound: `version_not_found` or `adapter_deleted`.
        """
        names.digest(digest, field="digest")
        _check_holder(holder)
        if not 1 <= ttl_seconds <= MAX_LEASE_SECONDS:
            message = f"ttl_seconds must be from 1 to {MAX_LEASE_SECONDS}."
            raise InvalidArgument(
                "bad_ttl", message, field="ttl_seconds", value=ttl_seconds, limit=MAX_LEASE_SECONDS
            )
        may_begin = await self._is_live(tenant, digest)
        with index_errors():
            ends = await self._redis.eval(
                _ACQUIRE,
                1,
                _key(tenant, digest),
                holder,
                str(ttl_seconds * 1000),
                "1" if may_begin else "0",
                str(MAX_LEASE_SECONDS * 1000),
            )
        if not ends:
            raise NotFound("adapter_deleted", f"Version {digest} was deleted.", resource=digest)
        return HeldLease(digest, holder, int(ends))

    async def release(self, tenant: str, digest: str, holder: str) -> None:
        """Give a lease back; nothing happens where there is none. Raises `bad_digest` or `bad_holder`."""
        names.digest(digest, field="digest")
        _check_holder(holder)
        with index_errors():
            await self._redis.zrem(_key(tenant, digest), holder)

    async def held(self) -> frozenset[tuple[str, str]]:
        """Return (tenant, digest) of every version that is leased now."""
        found = set()
        with index_errors():
            async for key in self._redis.scan_iter(match=_PREFIX + "*", count=500):
                if await self._redis.eval(_HELD, 1, key):
                    tenant, _, digest = key.decode().removeprefix(_PREFIX).partition(":")
                    found.add((tenant, digest))
        return frozenset(found)

    async def _is_live(self, tenant: str, digest: str) -> bool:
        [newest] = await self._catalogue.query(("HGET", tenant_key(tenant, "digests"), digest))
        if newest is None:
            raise NotFound("version_not_found", f"There is no version {digest}.", resource=digest)
        adapter, number = json.loads(newest)
        version = await self._lookup.version(self._catalogue, tenant, adapter, number)
        return version is not None and version.delete_time_ms is None


def _key(tenant: str, digest: str) -> str:
    return f"{_PREFIX}{tenant}:{digest}"


def _check_holder(holder: str) -> None:
    if not 0 < len(holder) <= MAX_HOLDER_CHARS or not (holder.isascii() and holder.isprintable()):
        message = f"holder has 1 to {MAX_HOLDER_CHARS} printable ASCII characters."
        raise InvalidArgument("bad_holder", message, field="holder", limit=MAX_HOLDER_CHARS)
