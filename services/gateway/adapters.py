"""`/v1/adapters`: versions, aliases and what is loaded; ours, beside OpenAI's routes."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import grpc
from fastapi import APIRouter, Depends, Query
from pydantic import Field
from starlette.requests import Request

from lorafleet.inference.v1.inference_service_pb2 import ListResidentRequest, ResidentAdapter
from lorafleet.registry.v1.adapter_pb2 import (
    DeleteAdapterRequest,
    DeleteAliasRequest,
    DeleteVersionRequest,
    GetAdapterRequest,
    ListAdaptersRequest,
    ListAliasesRequest,
    ListAliasHistoryRequest,
    ListVersionsRequest,
    ResolveVersionRequest,
    RollbackAliasRequest,
    SetAliasRequest,
)
from services.common.errors import Code
from services.gateway.adapter_files import VersionNumber, version_object
from services.gateway.auth import requires
from services.gateway.errors import from_upstream
from services.gateway.json_body import Body, json_body
from services.gateway.keys import Scope
from services.gateway.paging import all_items, page_after, page_size
from services.gateway.plain import plain
from services.gateway.state import Gateway, gateway_of

router = APIRouter(prefix="/v1/adapters", dependencies=[Depends(requires(Scope.ADAPTERS))])

Limit = Annotated[int, Query(ge=1, le=1000)]
Generation = Annotated[int, Field(ge=0, le=2**63 - 1)]


class AliasMove(Body):
    """Where to point an alias; with `expected_generation` only if nobody moved it since (0: if it is new)."""

    version: Annotated[int, Field(ge=1, le=999_999_999)]
    expected_generation: Generation | None = None


class AliasRollback(Body):
    """How to roll an alias back; with `expected_generation` only if nobody moved it since."""

    expected_generation: Generation | None = None


@router.get("")
async def list_adapters(request: Request, limit: Limit = 100, after: str | None = None) -> dict[str, Any]:
    """List the tenant's adapters by name."""
    ask = ListAdaptersRequest(page_size=page_size(after, limit))
    adapters = all_items(
        gateway_of(request).upstream.adapters.ListAdapters, ask, lambda answer: answer.adapters
    )
    page = await page_after(adapters, lambda adapter: adapter.name, after=after, limit=limit)
    return page.object(lambda adapter: {"id": adapter.name, "object": "adapter", **plain(adapter)})


# Before the route of one adapter, which it would match otherwise.
@router.get("/resident")
async def list_resident(request: Request) -> dict[str, Any]:
    """List which of the tenant's versions inference holds, and on which tier."""
    gateway = gateway_of(request)
    resident = (await gateway.upstream.inference.ListResident(ListResidentRequest())).adapters
    are_own = await asyncio.gather(*(_is_own(gateway, adapter) for adapter in resident))
    data = [
        {"id": adapter.digest, "object": "adapter.resident", **plain(adapter)}
        for adapter, is_own in zip(resident, are_own, strict=True)
        if is_own
    ]
    return {"object": "list", "data": data}


@router.get("/{name}")
async def get_adapter(request: Request, name: str) -> dict[str, Any]:
    """Return one adapter with its newest version and its aliases."""
    adapter = await gateway_of(request).upstream.adapters.GetAdapter(GetAdapterRequest(adapter=name))
    return {"id": adapter.name, "object": "adapter", **plain(adapter)}


@router.get("/{name}/versions")
async def list_versions(
    request: Request, name: str, limit: Limit = 100, after: str | None = None
) -> dict[str, Any]:
    """List an adapter's versions, newest first; the id of version 3 is `name:3`."""
    ask = ListVersionsRequest(adapter=name, page_size=page_size(after, limit))
    versions = all_items(
        gateway_of(request).upstream.adapters.ListVersions, ask, lambda answer: answer.versions
    )
    page = await page_after(
        versions, lambda version: f"{version.adapter}:{version.version}", after=after, limit=limit
    )
    return page.object(version_object)


@router.delete("/{name}")
async def delete_adapter(request: Request, name: str) -> dict[str, Any]:
    """Delete an adapter with all of its versions and aliases; running requests finish."""
    await gateway_of(request).upstream.adapters.DeleteAdapter(DeleteAdapterRequest(adapter=name))
    return {"id": name, "object": "adapter", "deleted": True}


@router.delete("/{name}/versions/{version}")
async def delete_version(request: Request, name: str, version: VersionNumber) -> dict[str, Any]:
    """Delete one version; running requests finish on it, and its number is not used again."""
    await gateway_of(request).upstream.adapters.DeleteVersion(
        DeleteVersionRequest(adapter=name, version=version)
    )
    return {"id": f"{name}:{version}", "object": "adapter.version", "deleted": True}


@router.get("/{name}/aliases")
async def list_aliases(request: Request, name: str) -> dict[str, Any]:
    """List where an adapter's aliases point now."""
    adapters = gateway_of(request).upstream.adapters
    await adapters.GetAdapter(GetAdapterRequest(adapter=name))
    answer = await adapters.ListAliases(ListAliasesRequest(adapter=name))
    return {
        "object": "list",
        "data": [{"object": "adapter.alias", **plain(alias)} for alias in answer.aliases],
    }


@router.put("/{name}/aliases/{alias}")
async def set_alias(
    request: Request, name: str, alias: str, body: Annotated[AliasMove, Depends(json_body(AliasMove))]
) -> dict[str, Any]:
    """Create an alias or move it."""
    moved = await gateway_of(request).upstream.adapters.SetAlias(
        SetAliasRequest(
            adapter=name, alias=alias, version=body.version, expected_generation=body.expected_generation
        )
    )
    return {"object": "adapter.alias", **plain(moved)}


@router.post("/{name}/aliases/{alias}/rollback")
async def roll_alias_back(
    request: Request, name: str, alias: str, body: Annotated[AliasRollback, Depends(json_body(AliasRollback))]
) -> dict[str, Any]:
    """Point an alias at the version it pointed to before its last move."""
    moved = await gateway_of(request).upstream.adapters.RollbackAlias(
        RollbackAliasRequest(adapter=name, alias=alias, expected_generation=body.expected_generation)
    )
    return {"object": "adapter.alias", **plain(moved)}


@router.delete("/{name}/aliases/{alias}")
async def delete_alias(request: Request, name: str, alias: str) -> dict[str, Any]:
    """Delete an alias; the version stays."""
    await gateway_of(request).upstream.adapters.DeleteAlias(DeleteAliasRequest(adapter=name, alias=alias))
    return {"id": f"{name}@{alias}", "object": "adapter.alias", "deleted": True}


@router.get("/{name}/aliases/{alias}/history")
async def list_alias_history(
    request: Request, name: str, alias: str, limit: Limit = 100, after: str | None = None
) -> dict[str, Any]:
    """List the moves of an alias, newest first; a move's id is its generation."""
    ask = ListAliasHistoryRequest(adapter=name, alias=alias, page_size=page_size(after, limit))
    moves = all_items(
        gateway_of(request).upstream.adapters.ListAliasHistory, ask, lambda answer: answer.moves
    )
    page = await page_after(moves, lambda move: str(move.generation), after=after, limit=limit)
    return page.object(
        lambda move: {"id": str(move.generation), "object": "adapter.alias_move", **plain(move)}
    )


async def _is_own(gateway: Gateway, adapter: ResidentAdapter) -> bool:
    """Return whether a resident version is the caller's: its name leads the caller to the same digest."""
    try:
        version = await gateway.upstream.adapters.ResolveVersion(
            ResolveVersionRequest(ref=adapter.version_ref)
        )
    except grpc.RpcError as error:
        if from_upstream(error).code in (Code.NOT_FOUND, Code.INVALID_ARGUMENT):
            return False
        raise
    return version.digest == adapter.digest
