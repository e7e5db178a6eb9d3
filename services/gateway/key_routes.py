"""`/v1/keys`: make, list and revoke API keys. No key can make one that may do more than itself."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import Field, StringConstraints
from starlette.requests import Request

from services.common.errors import NotFound, PermissionDenied
from services.gateway.auth import principal_of, requires
from services.gateway.json_body import Body, json_body
from services.gateway.keys import KeyLimits, KeyRecord, Principal, Scope
from services.gateway.paging import in_memory, page_after
from services.gateway.state import gateway_of

router = APIRouter(prefix="/v1/keys", dependencies=[Depends(requires(Scope.KEYS))])

_DAY_SECONDS = 24 * 3600

Limit = Annotated[int, Query(ge=1, le=1000)]
Rate = Annotated[int, Field(ge=1, le=2**31 - 1)]


class NewKey(Body):
    """What a key is for. Absent scopes and limits are those of the key that makes it.

    `tenant` may be another one only for a key with the scope `operate`.
    """

    name: Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""
    tenant: str | None = None
    scopes: Annotated[list[str], Field(min_length=1, max_length=16)] | None = None
    expires_in_days: Annotated[int, Field(ge=1, le=3650)] | None = None
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None


@router.post("")
async def create_key(request: Request, body: Annotated[NewKey, Depends(json_body(NewKey))]) -> dict[str, Any]:
    """Make a key. The answer is the only place where it can be read."""
    maker, keys = principal_of(request), gateway_of(request).keys
    tenant = body.tenant or maker.tenant
    if tenant != maker.tenant and Scope.OPERATE not in maker.scopes:
        raise PermissionDenied(
            "permission_denied", "this API key makes keys of its own tenant alone", field="tenant"
        )
    limits = KeyLimits(
        _limit("requests_per_minute", body.requests_per_minute, maker.limits.requests_per_minute),
        _limit("tokens_per_minute", body.tokens_per_minute, maker.limits.tokens_per_minute),
    )
    record, key = await asyncio.to_thread(
        keys.make,
        tenant,
        _scopes(body.scopes, maker),
        name=body.name,
        lifetime_seconds=None if body.expires_in_days is None else body.expires_in_days * _DAY_SECONDS,
        limits=limits,
    )
    return {**_object(record), "key": key}


@router.get("")
async def list_keys(request: Request, limit: Limit = 100, after: str | None = None) -> dict[str, Any]:
    """List the tenant's keys that were not revoked, without their secrets."""
    records = await asyncio.to_thread(gateway_of(request).keys.of_tenant, principal_of(request).tenant)
    page = await page_after(in_memory(records), lambda record: record.id, after=after, limit=limit)
    return page.object(_object)


@router.delete("/{key_id}")
async def revoke_key(request: Request, key_id: str) -> dict[str, Any]:
    """Make a key of the tenant useless, within a second on every gateway."""
    keys, tenant = gateway_of(request).keys, principal_of(request).tenant
    if not any(record.id == key_id for record in await asyncio.to_thread(keys.of_tenant, tenant)):
        raise NotFound("key_not_found", "no such key is in use", field="key_id", value=key_id)
    await asyncio.to_thread(keys.revoke, key_id)
    return {"id": key_id, "object": "key", "deleted": True}


def _scopes(wanted: list[str] | None, maker: Principal) -> frozenset[Scope]:
    if wanted is None:
        return maker.scopes
    own = {scope.value for scope in maker.scopes}
    beyond = sorted(set(wanted) - own)
    if beyond:
        raise PermissionDenied(
            "permission_denied",
            f"this API key has no scope {beyond[0][:32]!r} to give; it has {', '.join(sorted(own))}",
            field="scopes",
        )
    return frozenset(Scope(scope) for scope in wanted)


def _limit(field: str, wanted: int | None, own: int | None) -> int | None:
    """Return a limit of a new key: what is wanted, at most the maker's own, which is also the default."""
    if wanted is not None and own is not None and wanted > own:
        raise PermissionDenied(
            "permission_denied", f"{field} must be at most this key's own, {own}", field=field
        )
    return own if wanted is None else wanted


def _object(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "key",
        "name": record.name,
        "tenant": record.tenant,
        "scopes": sorted(scope.value for scope in record.scopes),
        "created_at": record.create_time,
        "expires_at": record.expire_time,
        "requests_per_minute": record.requests_per_minute,
        "tokens_per_minute": record.tokens_per_minute,
    }
