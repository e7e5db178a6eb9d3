"""A file service in memory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator

from google.protobuf.timestamp_pb2 import Timestamp

from lorafleet.registry.v1 import file_pb2 as files
from lorafleet.registry.v1.file_pb2_grpc import FileServiceServicer
from services.common.call_context import current_tenant
from services.common.errors import (
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from services.common.ids import new_id
from tests.support.fake_base import Context, now


class FakeFiles(FileServiceServicer):
    """Files by tenant and id, in memory."""

    def __init__(self, limit_bytes: int = 1 << 20) -> None:
        self.stored: dict[tuple[str, str], tuple[files.File, bytes]] = {}
        self.open: dict[tuple[str, str], tuple[files.StartUploadRequest, bytearray]] = {}
        self.limit_bytes = limit_bytes
        self.largest_message_bytes = 0

    async def CreateFile(
        self, request_iterator: AsyncIterator[files.CreateFileRequest], context: Context
    ) -> files.File:
        header, data = None, b""
        async for request in request_iterator:
            self.largest_message_bytes = max(self.largest_message_bytes, request.ByteSize())
            if request.WhichOneof("message") == "header":
                header = request.header
            data += request.data
            if len(data) > self.limit_bytes:
                raise ResourceExhausted("too_large", "the file is too large")
        assert header is not None
        if not data:
            raise InvalidArgument("empty_file", "the file is empty", field="data")
        if header.digest != "sha256:" + hashlib.sha256(data).hexdigest():
            raise InvalidArgument("digest_mismatch", "the bytes have another digest")
        made = files.File(
            id=new_id("file"),
            filename=header.filename,
            purpose=header.purpose,
            size_bytes=len(data),
            digest=header.digest,
            create_time=now(),
        )
        self.stored[current_tenant(), made.id] = (made, data)
        return made

    async def GetFile(self, request: files.GetFileRequest, context: Context) -> files.File:
        return self._entry(request.file_id)[0]

    async def ListFiles(self, request: files.ListFilesRequest, context: Context) -> files.ListFilesResponse:
        own = [made for (tenant, _), (made, _) in self.stored.items() if tenant == current_tenant()]
        wanted = [made for made in reversed(own) if request.purpose in (0, made.purpose)]
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        token = str(end) if end < len(wanted) else ""
        return files.ListFilesResponse(files=wanted[start:end], next_page_token=token)

    async def DownloadFile(
        self, request: files.DownloadFileRequest, context: Context
    ) -> AsyncIterator[files.DownloadFileResponse]:
        data = self._entry(request.file_id)[1]
        for offset in range(0, len(data), 1000):
            yield files.DownloadFileResponse(offset=offset, data=data[offset : offset + 1000])

    async def DeleteFile(
        self, request: files.DeleteFileRequest, context: Context
    ) -> files.DeleteFileResponse:
        self._entry(request.file_id)
        del self.stored[current_tenant(), request.file_id]
        return files.DeleteFileResponse()

    async def StartUpload(self, request: files.StartUploadRequest, context: Context) -> files.Upload:
        if request.size_bytes > self.limit_bytes:
            raise ResourceExhausted("too_large", "the file is too large", field="size_bytes")
        upload_id = new_id("upload")
        self.open[current_tenant(), upload_id] = request, bytearray()
        end = Timestamp(seconds=int(time.time()) + 3600)
        return files.Upload(id=upload_id, size_bytes=request.size_bytes, expire_time=end)

    async def AppendUpload(
        self, request_iterator: AsyncIterator[files.AppendUploadRequest], context: Context
    ) -> files.Upload:
        async for request in request_iterator:
            started, data = self._open(request.upload_id)
            assert data[request.offset : request.offset + len(request.data)] in (b"", request.data)
            data[request.offset :] = request.data
        return files.Upload(id=request.upload_id, committed_bytes=len(data), size_bytes=started.size_bytes)

    async def CompleteUpload(self, request: files.CompleteUploadRequest, context: Context) -> files.File:
        file_id = "file-" + request.upload_id.removeprefix("upload-")
        if (current_tenant(), file_id) in self.stored:
            return self.stored[current_tenant(), file_id][0]
        started, data = self._open(request.upload_id)
        assert len(data) == started.size_bytes
        assert request.digest == "sha256:" + hashlib.sha256(data).hexdigest()
        made = files.File(
            id=file_id,
            filename=started.header.filename,
            purpose=started.header.purpose,
            size_bytes=len(data),
            digest=request.digest,
            create_time=now(),
        )
        self.stored[current_tenant(), file_id] = (made, bytes(data))
        del self.open[current_tenant(), request.upload_id]
        return made

    async def CancelUpload(
        self, request: files.CancelUploadRequest, context: Context
    ) -> files.CancelUploadResponse:
        self._open(request.upload_id)
        del self.open[current_tenant(), request.upload_id]
        return files.CancelUploadResponse()

    def _open(self, upload_id: str) -> tuple[files.StartUploadRequest, bytearray]:
        entry = self.open.get((current_tenant(), upload_id))
        if entry is None:
            raise NotFound("upload_not_found", "no such upload", field="upload_id")
        return entry

    def _entry(self, file_id: str) -> tuple[files.File, bytes]:
        entry = self.stored.get((current_tenant(), file_id))
        if entry is None:
            raise NotFound("file_not_found", "no such file", resource=f"files/{file_id[:80]}")
        return entry
