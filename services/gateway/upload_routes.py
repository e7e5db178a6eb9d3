"""`/v1/uploads`: big files in parts, which may come at the same time and in any order."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar

import grpc
from fastapi import APIRouter, Depends
from pydantic import Field, StringConstraints
from starlette.requests import Request

from lorafleet.registry.v1.file_pb2 import (
    AppendUploadRequest,
    CancelUploadRequest,
    CompleteUploadRequest,
    CreateFileHeader,
    File,
    GetFileRequest,
    StartUploadRequest,
)
from services.common.errors import Code
from services.common.transport import CHUNK_BYTES
from services.gateway.auth import principal_of, requires
from services.gateway.disconnect import while_connected
from services.gateway.errors import from_upstream
from services.gateway.files import file_object, upload_purpose
from services.gateway.json_body import Body, json_body
from services.gateway.keys import Scope
from services.gateway.state import Gateway, gateway_of
from services.gateway.upload_parts import MAX_PARTS, Announced, Ended
from services.gateway.upstream_fields import in_http_terms

router = APIRouter(prefix="/v1/uploads", dependencies=[Depends(requires(Scope.FILES))])

MAX_PART_BYTES = 64 * 1024 * 1024
_FIELDS = {"header.": "", "size_bytes": "bytes", "data": "part_ids"}


class NewUpload(Body):
    """What the parts will make. `mime_type` says nothing here: rows are checked when a job reads them."""

    unsupported: ClassVar[frozenset[str]] = frozenset({"expires_after"})

    filename: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    purpose: str
    size_bytes: Annotated[int, Field(ge=1, le=2**63 - 1, alias="bytes")]
    mime_type: Annotated[str, StringConstraints(max_length=255)]


class UploadCompletion(Body):
    """The parts in the order of their bytes, with the MD5 of the whole where it is to be checked."""

    part_ids: Annotated[
        list[Annotated[str, StringConstraints(max_length=64)]], Field(min_length=1, max_length=MAX_PARTS)
    ]
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


@router.post("")
async def create_upload(
    request: Request, body: Annotated[NewUpload, Depends(json_body(NewUpload))]
) -> dict[str, Any]:
    """Announce a file that comes in parts, within an hour."""
    gateway, tenant = gateway_of(request), principal_of(request).tenant
    header = CreateFileHeader(filename=body.filename, purpose=upload_purpose(body.purpose))
    try:
        started = await gateway.upstream.files.StartUpload(
            StartUploadRequest(header=header, size_bytes=body.size_bytes)
        )
    except grpc.RpcError as error:
        raise in_http_terms(from_upstream(error), _FIELDS) from error
    announced = Announced(
        id=started.id,
        filename=body.filename,
        purpose=body.purpose,
        mime_type=body.mime_type,
        size_bytes=body.size_bytes,
        create_time=int(time.time()),
        expire_time=started.expire_time.seconds,
    )
    await asyncio.to_thread(gateway.upload_parts.announce, tenant, announced)
    return _object(announced, None)


@router.post("/{upload_id}/parts")
async def add_part(request: Request, upload_id: str) -> dict[str, Any]:
    """Take a part, the form's file `data`, of at most 64 MiB."""
    gateway, tenant = gateway_of(request), principal_of(request).tenant
    await asyncio.to_thread(gateway.upload_parts.pending, tenant, upload_id)
    async with gateway.uploads.receive(request, files={"data": MAX_PART_BYTES}) as form:
        part_id = await asyncio.to_thread(gateway.upload_parts.add, tenant, upload_id, form.file("data"))
    return {
        "id": part_id,
        "object": "upload.part",
        "created_at": int(time.time()),
        "upload_id": upload_id,
    }


@router.post("/{upload_id}/complete")
async def complete_upload(
    request: Request, upload_id: str, body: Annotated[UploadCompletion, Depends(json_body(UploadCompletion))]
) -> dict[str, Any]:
    """Put the parts together into a file; a second time, return it again."""
    gateway, tenant = gateway_of(request), principal_of(request).tenant
    announced, ended = await asyncio.to_thread(gateway.upload_parts.find, tenant, upload_id)
    if ended is not None and ended.file_id is not None:
        file = await gateway.upstream.files.GetFile(GetFileRequest(file_id=ended.file_id))
        return _object(announced, ended, file)
    await asyncio.to_thread(gateway.upload_parts.pending, tenant, upload_id)
    await asyncio.to_thread(gateway.upload_parts.check, tenant, announced, body.part_ids, body.md5)
    file = await while_connected(request, _put_together(gateway, tenant, upload_id, body.part_ids))
    ended = Ended(file_id=file.id)
    await asyncio.to_thread(gateway.upload_parts.end, tenant, upload_id, ended)
    return _object(announced, ended, file)


@router.post("/{upload_id}/cancel")
async def cancel_upload(request: Request, upload_id: str) -> dict[str, Any]:
    """Drop an upload and its parts."""
    gateway, tenant = gateway_of(request), principal_of(request).tenant
    announced, ended = await asyncio.to_thread(gateway.upload_parts.find, tenant, upload_id)
    if ended is None or ended.file_id is not None:
        await asyncio.to_thread(gateway.upload_parts.pending, tenant, upload_id)
        file = await _dropped(gateway, upload_id)
        ended = Ended(file_id=None if file is None else file.id)
        await asyncio.to_thread(gateway.upload_parts.end, tenant, upload_id, ended)
        if file is not None:
            await asyncio.to_thread(gateway.upload_parts.pending, tenant, upload_id)
    return _object(announced, ended)


async def _dropped(gateway: Gateway, upload_id: str) -> File | None:
    """Drop the upload of the registry; return its file where somebody has completed it meanwhile."""
    files = gateway.upstream.files
    try:
        await files.CancelUpload(CancelUploadRequest(upload_id=upload_id))
    except grpc.RpcError as error:
        if from_upstream(error).code is not Code.NOT_FOUND:
            raise
    else:
        return None
    try:
        # Completing once more gives the same file again, and nothing where there is none.
        return await files.CompleteUpload(CompleteUploadRequest(upload_id=upload_id))
    except grpc.RpcError as error:
        if from_upstream(error).code is not Code.NOT_FOUND:
            raise
        return None


async def _put_together(gateway: Gateway, tenant: str, upload_id: str, part_ids: Sequence[str]) -> File:
    """Send the parts to the registry. What an earlier attempt has sent is passed over there."""
    files, timeout = gateway.upstream.files, gateway.settings.stream_timeout_seconds
    sha256 = hashlib.sha256()

    async def messages() -> AsyncIterator[AppendUploadRequest]:
        offset, chunks = 0, gateway.upload_parts.chunks(tenant, upload_id, part_ids)
        while chunk := await asyncio.to_thread(next, chunks, b""):
            sha256.update(chunk)
            for start in range(0, len(chunk), CHUNK_BYTES):
                piece = chunk[start : start + CHUNK_BYTES]
                yield AppendUploadRequest(upload_id=upload_id, offset=offset, data=piece)
                offset += len(piece)

    try:
        await files.AppendUpload(messages(), timeout=timeout)
    except grpc.RpcError as error:
        refusal = in_http_terms(from_upstream(error), _FIELDS)
        # It may be complete already, by an attempt whose answer was lost.
        if refusal.code is not Code.NOT_FOUND:
            raise refusal from error
    digest = f"sha256:{sha256.hexdigest()}"
    try:
        return await files.CompleteUpload(
            CompleteUploadRequest(upload_id=upload_id, digest=digest), timeout=timeout
        )
    except grpc.RpcError as error:
        raise in_http_terms(from_upstream(error), _FIELDS) from error


def _object(announced: Announced, ended: Ended | None, file: File | None = None) -> dict[str, Any]:
    """Return OpenAI's upload object."""
    if ended is None:
        status = "expired" if announced.expire_time <= time.time() else "pending"
    else:
        status = "cancelled" if ended.file_id is None else "completed"
    return {
        "id": announced.id,
        "object": "upload",
        "bytes": announced.size_bytes,
        "created_at": announced.create_time,
        "expires_at": announced.expire_time,
        "filename": announced.filename,
        "purpose": announced.purpose,
        "status": status,
        "file": None if file is None else file_object(file),
    }
