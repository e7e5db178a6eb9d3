"""The two files of an adapter version: a PEFT folder published, and given back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

import grpc
from fastapi import APIRouter, Depends, Header, Path
from starlette.requests import Request
from starlette.responses import Response

from lorafleet.registry.v1.adapter_pb2 import (
    AdapterFile,
    AdapterVersion,
    DownloadVersionRequest,
    DownloadVersionResponse,
    FileChunk,
    ModelCard,
    PublishVersionHeader,
    PublishVersionRequest,
    ResolveVersionRequest,
)
from lorafleet.registry.v1.base_model_pb2 import GetBaseModelRequest
from services.common.errors import NotFound
from services.gateway.auth import requires
from services.gateway.byte_stream import ByteStream
from services.gateway.disconnect import while_connected
from services.gateway.errors import from_upstream
from services.gateway.keys import Scope
from services.gateway.plain import plain
from services.gateway.served_base import BaseIdentity
from services.gateway.state import Gateway, gateway_of
from services.gateway.uploads import Form
from services.gateway.upstream_fields import in_http_terms

router = APIRouter(prefix="/v1/adapters", dependencies=[Depends(requires(Scope.ADAPTERS))])

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = {CONFIG_FILE: 1024 * 1024, WEIGHTS_FILE: None}
_FIELDS = {
    "header.adapter": "name",
    "header.base_fingerprint_digest": "base",
    "header.card.description": "description",
    "header.idempotency_key": "idempotency-key",
    "header.files": WEIGHTS_FILE,
    "header.": "",
}

VersionNumber = Annotated[int, Path(ge=1, le=999_999_999)]


@router.post("/{name}/versions")
async def publish_version(
    request: Request, name: str, idempotency_key: Annotated[str | None, Header()] = None
) -> dict[str, Any]:
    """Publish the next version from the two files of a PEFT folder.

    The form has the files `adapter_config.json` and `adapter_model.safetensors`, and may have the texts
    `base`, the name of the base that the adapter is for where that is not the served one, and `description`.
    The same `Idempotency-Key` with the same content returns the first version again.
    """
    gateway = gateway_of(request)
    async with gateway.uploads.receive(request, files=FILES, fields={"base", "description"}) as form:
        for file in FILES:
            form.file(file)
        base = await _base(gateway, form.fields.get("base"))
        header = PublishVersionHeader(
            adapter=name,
            base_fingerprint_digest=base.fingerprint_digest,
            files=[
                AdapterFile(name=file, digest=received.digest, size_bytes=received.size_bytes)
                for file, received in form.files.items()
            ],
            card=ModelCard(description=form.fields.get("description", ""), base_model=base.name),
            idempotency_key=idempotency_key or "",
        )
        return version_object(await while_connected(request, _publish(gateway, header, form)))


@router.get("/{name}/versions/{version}")
async def get_version(request: Request, name: str, version: VersionNumber) -> dict[str, Any]:
    """Return one version with its card: where it comes from, and what was measured on it."""
    found = await gateway_of(request).upstream.adapters.ResolveVersion(
        ResolveVersionRequest(ref=f"{name}:{version}")
    )
    return version_object(found)


@router.get("/{name}/versions/{version}/files/{file}")
async def download_file(request: Request, name: str, version: VersionNumber, file: str) -> Response:
    """Return the bytes of `adapter_config.json` or `adapter_model.safetensors`."""
    gateway, ref = gateway_of(request), f"{name}:{version}"
    found = await gateway.upstream.adapters.ResolveVersion(ResolveVersionRequest(ref=ref))
    sizes = {entry.name: entry.size_bytes for entry in found.files}
    if file not in sizes:
        raise NotFound("file_not_found", f"a version has {' and '.join(FILES)}", field="file", value=file)
    call = gateway.upstream.adapters.DownloadVersion(
        DownloadVersionRequest(ref=ref, file=file), timeout=gateway.settings.stream_timeout_seconds
    )
    headers = {
        "content-length": str(sizes[file]),
        "content-disposition": f'attachment; filename="{file}"',
    }
    return ByteStream(_bytes_of(aiter(call)), on_close=call.cancel, headers=headers)


def version_object(version: AdapterVersion) -> dict[str, Any]:
    """Return our object of a version; its id is a model name."""
    return {
        "id": f"{version.adapter}:{version.version}",
        "object": "adapter.version",
        **plain(version),
    }


async def _base(gateway: Gateway, name: str | None) -> BaseIdentity:
    """Return the base of this name, or the one that is served."""
    if name is None:
        return await gateway.served_base.identity()
    try:
        base = await gateway.upstream.bases.GetBaseModel(GetBaseModelRequest(name=name))
    except grpc.RpcError as error:
        refusal = from_upstream(error)
        refusal.field = "base"
        raise refusal from error
    return BaseIdentity(base.name, base.fingerprint.digest)


async def _publish(gateway: Gateway, header: PublishVersionHeader, form: Form) -> AdapterVersion:
    async def messages() -> AsyncIterator[PublishVersionRequest]:
        yield PublishVersionRequest(header=header)
        for name, file in form.files.items():
            async for data in file.chunks():
                yield PublishVersionRequest(chunk=FileChunk(file=name, data=data))

    try:
        return await gateway.upstream.adapters.PublishVersion(
            messages(), timeout=gateway.settings.stream_timeout_seconds
        )
    except grpc.RpcError as error:
        raise in_http_terms(from_upstream(error), _FIELDS) from error


async def _bytes_of(responses: AsyncIterator[DownloadVersionResponse]) -> AsyncGenerator[bytes]:
    async for response in responses:
        yield response.data
