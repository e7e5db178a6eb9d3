"""API keys: random, shown once, stored as a keyed hash under a part that is no secret.

A key reads `lf-<id>-<secret>`. Its record lies at `gateway/keys/<id>.json` and holds HMAC-SHA256 of the whole
key under the operator's pepper, so neither the store alone nor the pepper alone yields a key. A revocation is
a second object; nothing is overwritten.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import hmac
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from services.common.errors import InvalidArgument, NotFound, Unauthenticated, Unavailable
from services.common.names import tenant_name
from services.common.store import ObjectExistsError, ObjectNotFoundError, ObjectStore

_KEY = re.compile(r"lf-([a-z2-7]{16})-([A-Za-z0-9_-]{43})")
_KEY_ID = re.compile(r"[a-z2-7]{16}")
_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_ID_CHARS = 16
_SECRET_BYTES = 32
_CACHE_ENTRIES = 10_000
# A key may be used right after it was made, so its absence is not remembered for long.
_ABSENT_CACHE_SECONDS = 1.0
_NO_DIGEST = "0" * 64
# Where the trainer keeps candidates before they are published.
_RESERVED_TENANTS = "lorafleet-"
# How long a key that was good is trusted while the store does not answer.
STALE_SECONDS = 60.0


class Scope(enum.StrEnum):
    """What a key may be used for. Listing models needs no more than a valid key."""

    INFERENCE = "inference"
    FILES = "files"
    FINE_TUNING = "fine_tuning"
    ADAPTERS = "adapters"
    KEYS = "keys"
    OPERATE = "operate"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """How much a key may ask for; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


NO_LIMITS = KeyLimits()


class KeyRecord(BaseModel):
    """What is stored of a key. Times are Unix seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    tenant: str
    scopes: frozenset[Scope]
    digest: str
    create_time: int
    expire_time: int | None = None
    name: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a request: a tenant, by one of its keys."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    limits: KeyLimits = NO_LIMITS


@dataclass(frozen=True, slots=True)
class _Cached:
    record: KeyRecord | None
    read_at: float
    until: float


class KeyRing:
    """Makes, checks and revokes keys against the object store."""

    def __init__(self, store: ObjectStore, pepper: str, cache_seconds: float) -> None:
        self._store = store
        self._pepper = pepper.encode()
        self._cache_seconds = cache_seconds
        self._cache: OrderedDict[str, _Cached] = OrderedDict()

    def create(
        self, tenant: str, scopes: Iterable[Scope] = tuple(Scope), *, lifetime_seconds: int | None = None
    ) -> str:
        """Store a new key of `tenant` and return it; it cannot be read again. Errors as `make`."""
        return self.make(tenant, scopes, lifetime_seconds=lifetime_seconds)[1]

    def make(
        self,
        tenant: str,
        scopes: Iterable[Scope],
        *,
        name: str = "",
        lifetime_seconds: int | None = None,
        limits: KeyLimits = NO_LIMITS,
    ) -> tuple[KeyRecord, str]:
        """Store a new key of `tenant`; return its record and the key itself, which cannot be read again.

        Raises:
            InvalidArgument: `bad_tenant`.
            Unavailable: `store_unavailable`.
        """
        tenant_name(tenant)
        if tenant.startswith(_RESERVED_TENANTS):
            raise InvalidArgument(
                "bad_tenant",
                f"tenants whose names begin with {_RESERVED_TENANTS} are the services' own",
                field="tenant",
                value=tenant,
            )
        key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_CHARS))
        key = f"lf-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
        now = int(time.time())
        record = KeyRecord(
            id=key_id,
            tenant=tenant,
            scopes=frozenset(scopes),
            digest=self._digest(key),
            create_time=now,
            expire_time=None if lifetime_seconds is None else now + lifetime_seconds,
            name=name,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
        )
        # The listing's entry first: a key that works and is in no list could not be found to be revoked.
        self._store.put(_tenant_entry(tenant, key_id), b"", if_absent=True)
        self._store.put(_record_key(key_id), record.model_dump_json().encode(), if_absent=True)
        return record, key

    def of_tenant(self, tenant: str) -> list[KeyRecord]:
        """Return the records of a tenant's keys that were not revoked, oldest first."""
        prefix = _tenant_entry(tenant, "")
        ids = [entry.key.removeprefix(prefix) for entry in self._store.list(prefix)]
        records = [record for record in map(self._stored, ids) if record is not None]
        return sorted(records, key=lambda record: (record.create_time, record.id))

    def revoke(self, key_id: str) -> None:
        """Make a key useless; running gateways notice within their `key_cache_seconds`.

        Raises:
            NotFound: `key_not_found`.
        """
        if not _KEY_ID.fullmatch(key_id) or self._stored(key_id) is None:
            raise NotFound("key_not_found", "no such key is in use", field="key_id", value=key_id)
        body = json.dumps({"id": key_id, "revoke_time": int(time.time())}).encode()
        # Whoever revokes the same key at the same moment has done the work.
        with contextlib.suppress(ObjectExistsError):
            self._store.put(_revocation_key(key_id), body, if_absent=True)
        self._cache.pop(key_id, None)

    async def authenticate(self, key: str | None) -> Principal:
        """Return whose key it is.

        Raises:
            Unauthenticated: `invalid_api_key`, the same for a missing, malformed, unknown, wrong, revoked or
                expired key.
            Unavailable: `store_unavailable`, for a key that is not in the cache.
        """
        match = _KEY.fullmatch(key or "")
        if key is None or match is None:
            raise _invalid_api_key()
        record = await self._record(match[1])
        # Compared in any case, so that a known id takes as long as an unknown one.
        is_right = hmac.compare_digest(self._digest(key), record.digest if record else _NO_DIGEST)
        if record is None or not is_right or _is_expired(record):
            raise _invalid_api_key()
        limits = KeyLimits(record.requests_per_minute, record.tokens_per_minute)
        return Principal(record.id, record.tenant, record.scopes, limits)

    async def _record(self, key_id: str) -> KeyRecord | None:
        cached, now = self._cache.get(key_id), time.monotonic()
        if cached is not None and now < cached.until:
            return cached.record
        try:
            record = await asyncio.to_thread(self._stored, key_id)
        except Unavailable:
            # A key that was good a moment ago stays good while nobody can tell.
            if cached is None or cached.record is None or now - cached.read_at > STALE_SECONDS:
                raise
            return cached.record
        seconds = self._cache_seconds if record else min(self._cache_seconds, _ABSENT_CACHE_SECONDS)
        self._cache[key_id] = _Cached(record, now, now + seconds)
        self._cache.move_to_end(key_id)
        if len(self._cache) > _CACHE_ENTRIES:
            self._cache.popitem(last=False)
        return record

    def _stored(self, key_id: str) -> KeyRecord | None:
        """Return the record of a key that exists and is not revoked."""
        try:
            data = self._store.get(_record_key(key_id))
        except ObjectNotFoundError:
            return None
        try:
            self._store.stat(_revocation_key(key_id))
        except ObjectNotFoundError:
            return KeyRecord.model_validate_json(data)
        return None

    def _digest(self, key: str) -> str:
        return hmac.new(self._pepper, key.encode(), hashlib.sha256).hexdigest()


def _record_key(key_id: str) -> str:
    return f"gateway/keys/{key_id}.json"


def _tenant_entry(tenant: str, key_id: str) -> str:
    return f"gateway/tenants/{tenant}/keys/{key_id}"


def _revocation_key(key_id: str) -> str:
    return f"gateway/revoked-keys/{key_id}.json"


def _is_expired(record: KeyRecord) -> bool:
    return record.expire_time is not None and record.expire_time <= time.time()


def _invalid_api_key() -> Unauthenticated:
    return Unauthenticated("invalid_api_key", "the API key is missing or is not valid")
