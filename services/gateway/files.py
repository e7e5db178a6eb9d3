"""`/v1/files`: data sets and result files, kept by the registry."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, Literal
from urllib.parse import quote

import grpc
from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from lorafleet.registry.v1.file_pb2 import (
    CreateFileHeader,
    CreateFileRequest,
    DeleteFileRequest,
    DownloadFileRequest,
    DownloadFileResponse,
    File,
    FilePurpose,
    GetFileRequest,
    ListFilesRequest,
)
from services.common.errors import InvalidArgument
from services.gateway.auth import requires
from services.gateway.byte_stream import ByteStream
from services.gateway.disconnect import while_connected
from services.gateway.errors import from_upstream
from services.gateway.keys import Scope
from services.gateway.paging import all_items, in_memory, page_after, page_size
from services.gateway.state import Gateway, gateway_of
from services.gateway.uploads import ReceivedFile
from services.gateway.upstream_fields import in_http_terms

router = APIRouter(dependencies=[Depends(requires(Scope.FILES))])

MAX_LIMIT = 10_000
_PURPOSES = {
    "fine-tune": FilePurpose.FILE_PURPOSE_FINE_TUNE,
    "fine-tune-results": FilePurpose.FILE_PURPOSE_FINE_TUNE_RESULTS,
}
# From the registry's field names to ours.
FIELDS = {"data": "file", "header.filename": "file", "header.": "", "digest": "file"}
_PURPOSE_NAMES = {number: name for name, number in _PURPOSES.items()}


@router.post("/v1/files")
async def create_file(request: Request) -> dict[str, Any]:
    """Store an uploaded file; `purpose` must be `fine-tune`."""
    gateway = gateway_of(request)
    async with gateway.uploads.receive(request, files={"file": None}, fields={"purpose"}) as form:
        file = form.file("file")
        header = CreateFileHeader(
            filename=file.filename, purpose=upload_purpose(form.fields.get("purpose")), digest=file.digest
        )
        return file_object(await while_connected(request, _send(gateway, header, file)))


@router.get("/v1/files")
async def list_files(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = MAX_LIMIT,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """List the tenant's files, newest first unless `order` is `asc`."""
    ask = ListFilesRequest(page_size=page_size(after, limit), purpose=_purpose(purpose))
    files = all_items(gateway_of(request).upstream.files.ListFiles, ask, lambda answer: answer.files)
    if order == "asc":
        files = in_memory([file async for file in files][::-1])
    page = await page_after(files, lambda file: file.id, after=after, limit=limit)
    return page.object(file_object)


@router.get("/v1/files/{file_id}")
async def get_file(request: Request, file_id: str) -> dict[str, Any]:
    """Return what is known of one file."""
    return file_object(await gateway_of(request).upstream.files.GetFile(GetFileRequest(file_id=file_id)))


@router.get("/v1/files/{file_id}/content")
async def download_file(request: Request, file_id: str) -> Response:
    """Return the bytes of one file."""
    gateway = gateway_of(request)
    file = await gateway.upstream.files.GetFile(GetFileRequest(file_id=file_id))
    call = gateway.upstream.files.DownloadFile(
        DownloadFileRequest(file_id=file_id), timeout=gateway.settings.stream_timeout_seconds
    )
    headers = {
        "content-length": str(file.size_bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
    }
    return ByteStream(_bytes_of(aiter(call)), on_close=call.cancel, headers=headers)


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request, file_id: str) -> dict[str, Any]:
    """Delete one file."""
    await gateway_of(request).upstream.files.DeleteFile(DeleteFileRequest(file_id=file_id))
    return {"id": file_id, "object": "file", "deleted": True}


def file_object(file: File) -> dict[str, Any]:
    """Return OpenAI's file object. What the registry lists is stored and checked, so always `processed`."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.create_time.seconds,
        "expires_at": None,
        "filename": file.filename,
        "purpose": _PURPOSE_NAMES[file.purpose],
        "status": "processed",
        "status_details": None,
    }


async def _send(gateway: Gateway, header: CreateFileHeader, file: ReceivedFile) -> File:
    async def messages() -> AsyncIterator[CreateFileRequest]:
        yield CreateFileRequest(header=header)
        async for chunk in file.chunks():
            yield CreateFileRequest(data=chunk)

    try:
        return await gateway.upstream.files.CreateFile(
            messages(), timeout=gateway.settings.stream_timeout_seconds
        )
    except grpc.RpcError as error:
        raise in_http_terms(from_upstream(error), FIELDS) from error


async def _bytes_of(responses: AsyncIterator[DownloadFileResponse]) -> AsyncGenerator[bytes]:
    async for response in responses:
        yield response.data


def upload_purpose(text: str | None) -> FilePurpose.ValueType:
    """Return the purpose of a file that a client sends; the services make the others."""
    if text is None:
        raise InvalidArgument("missing_required_parameter", "purpose is required", field="purpose")
    purpose = _purpose(text)
    if purpose != FilePurpose.FILE_PURPOSE_FINE_TUNE:
        raise InvalidArgument("invalid_value", "purpose must be fine-tune", field="purpose")
    return purpose


def _purpose(text: str | None) -> FilePurpose.ValueType:
    if text is None:
        return FilePurpose.FILE_PURPOSE_UNSPECIFIED
    if text not in _PURPOSES:
        raise InvalidArgument(
            "invalid_value", f"purpose must be one of {', '.join(_PURPOSES)}", field="purpose", value=text
        )
    return _PURPOSES[text]
