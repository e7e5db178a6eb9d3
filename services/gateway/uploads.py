"""Files that clients upload: read part by part onto disk, then sent on.

A form is taken apart and checked to its end before anything goes to the registry, so a bad form leaves
nothing behind there; in between the file lies in an unnamed temporary file, never in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import BinaryIO

from starlette.requests import ClientDisconnect, Request

from services.common.errors import InvalidArgument, ResourceExhausted
from services.common.transport import CHUNK_BYTES
from services.gateway.errors import ClientGoneError
from services.gateway.multipart import FormData, FormPart, MultipartForm

_FIELD_LIMIT_BYTES = 1024
_FILE_FIELD = "file"


@dataclass(frozen=True, slots=True)
class Upload:
    """A form that was read: its text fields, and its file with name, size and digest."""

    fields: dict[str, str]
    filename: str
    content: BinaryIO
    size_bytes: int
    digest: str

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the file from its beginning."""
        await asyncio.to_thread(self.content.seek, 0)
        while chunk := await asyncio.to_thread(self.content.read, CHUNK_BYTES):
            yield chunk


class UploadSpace:
    """Room on disk for uploads in progress."""

    def __init__(self, max_file_bytes: int, max_concurrent: int) -> None:
        self._max_file_bytes = max_file_bytes
        self._free = max_concurrent

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[Upload]:
        """Read the form of a request; the file is gone when the body of the `async with` ends.

        Raises:
            InvalidArgument: `bad_form`, or a part is missing (`missing_required_parameter`) or too much
                (`unsupported_parameter`).
            ResourceExhausted: `too_large`, as soon as it is; `too_many_uploads`.
        """
        if not self._free:
            raise ResourceExhausted(
                "too_many_uploads", "too many uploads are under way", retry_after_seconds=1
            )
        self._free -= 1
        try:
            with tempfile.TemporaryFile(prefix="lorafleet-upload-") as content:
                yield await self._read(request, content)
        finally:
            self._free += 1

    async def _read(self, request: Request, content: BinaryIO) -> Upload:
        texts: dict[str, bytearray] = {}
        filename, size_bytes, sha256 = None, 0, hashlib.sha256()
        part: FormPart | None = None
        held = bytearray()
        async for item in _form_items(request):
            if isinstance(item, FormPart):
                part = item
                if part.name in texts or (part.name == _FILE_FIELD and filename is not None):
                    raise InvalidArgument("bad_form", f"{part.name} is given twice", field=part.name)
                if part.name == _FILE_FIELD:
                    filename = part.filename
                else:
                    texts[part.name] = bytearray()
            elif part is not None and part.name == _FILE_FIELD:
                size_bytes += len(item.data)
                if size_bytes > self._max_file_bytes:
                    raise self._too_large()
                sha256.update(item.data)
                held += item.data
                if len(held) >= CHUNK_BYTES:
                    await asyncio.to_thread(content.write, bytes(held))
                    held.clear()
            elif part is not None:
                texts[part.name] += item.data
                if len(texts[part.name]) > _FIELD_LIMIT_BYTES:
                    raise InvalidArgument("bad_form", f"{part.name} is too long", field=part.name)
        await asyncio.to_thread(content.write, bytes(held))
        if filename is None:
            raise InvalidArgument("missing_required_parameter", "file is required", field=_FILE_FIELD)
        fields = {name: _decoded(name, text) for name, text in texts.items()}
        return Upload(fields, filename, content, size_bytes, f"sha256:{sha256.hexdigest()}")

    def _too_large(self) -> ResourceExhausted:
        limit = self._max_file_bytes
        return ResourceExhausted(
            "too_large", f"the file is larger than {limit} bytes", field=_FILE_FIELD, limit=limit, final=True
        )


async def _form_items(request: Request) -> AsyncIterator[FormPart | FormData]:
    form = MultipartForm(request.headers.get("content-type", ""))
    try:
        async for chunk in request.stream():
            for item in form.feed(chunk):
                yield item
    except ClientDisconnect as error:
        raise ClientGoneError from error
    form.finish()


def _decoded(name: str, text: bytearray) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument("bad_form", f"{name} is not UTF-8", field=name) from error
