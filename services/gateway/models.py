"""`/v1/models`: what can be asked for an answer."""

from __future__ import annotations

from typing import Any

import grpc
from fastapi import APIRouter, Depends
from starlette.requests import Request

from lorafleet.registry.v1.adapter_pb2 import (
    Adapter,
    AdapterVersion,
    ListAdaptersRequest,
    ResolveVersionRequest,
)
from lorafleet.registry.v1.base_model_pb2 import GetBaseModelRequest
from services.gateway.auth import requires
from services.gateway.errors import from_upstream
from services.gateway.model_names import parse_model_name
from services.gateway.paging import UPSTREAM_PAGE_SIZE, all_items
from services.gateway.served_base import BaseIdentity
from services.gateway.state import Gateway, gateway_of
from services.gateway.upstream_fields import in_http_terms

router = APIRouter(prefix="/v1/models", dependencies=[Depends(requires())])


@router.get("")
async def list_models(request: Request) -> dict[str, Any]:
    """List the base, then each adapter that fits it: by its name, for the newest version, and its aliases."""
    gateway = gateway_of(request)
    base = await gateway.served_base.identity()
    data = [await _base_object(gateway, base)]
    adapters = all_items(
        gateway.upstream.adapters.ListAdapters,
        ListAdaptersRequest(page_size=UPSTREAM_PAGE_SIZE),
        lambda answer: answer.adapters,
    )
    async for adapter in adapters:
        if adapter.latest_version.base_fingerprint_digest == base.fingerprint_digest:
            data += _adapter_objects(adapter, base, request.state.tenant)
    return {"object": "list", "data": data}


@router.get("/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """Return one model by any name that a request for an answer may use."""
    gateway = gateway_of(request)
    base = await gateway.served_base.identity()
    name = parse_model_name(model, base=base.name, tenant=request.state.tenant)
    if name.adapter is None:
        return await _base_object(gateway, base)
    try:
        version = await gateway.upstream.adapters.ResolveVersion(ResolveVersionRequest(ref=str(name.adapter)))
    except grpc.RpcError as error:
        raise in_http_terms(from_upstream(error)) from error
    return _version_object(model, version, request.state.tenant)


async def _base_object(gateway: Gateway, base: BaseIdentity) -> dict[str, Any]:
    record = await gateway.upstream.bases.GetBaseModel(GetBaseModelRequest(name=base.name))
    return {
        "id": base.name,
        "object": "model",
        "created": record.create_time.seconds,
        "owned_by": "lorafleet",
        "root": base.name,
        "parent": None,
    }


def _adapter_objects(adapter: Adapter, base: BaseIdentity, tenant: str) -> list[dict[str, Any]]:
    objects = [_version_object(adapter.name, adapter.latest_version, tenant)]
    objects += [
        {
            "id": f"{adapter.name}@{alias.name}",
            "object": "model",
            "created": alias.update_time.seconds,
            "owned_by": tenant,
            "root": f"{adapter.name}:{alias.version}",
            "parent": base.name,
        }
        for alias in adapter.aliases
    ]
    return objects


def _version_object(name: str, version: AdapterVersion, tenant: str) -> dict[str, Any]:
    """Return the model object of a version under `name`; `root` names the version, `parent` the base."""
    return {
        "id": name,
        "object": "model",
        "created": version.create_time.seconds,
        "owned_by": tenant,
        "root": f"{version.adapter}:{version.version}",
        "parent": version.base_model,
    }
