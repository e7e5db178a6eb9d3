"""A tenant's files: datasets and results, which never change once created."""

from __future__ import annotations

from services.common import ids, names
from services.common.errors import InvalidArgument, NotFound
from services.registry.blobs import Blobs, Upload
from services.registry.catalogue import Catalogue
from services.registry.clock import now_ms
from services.registry.index import tenant_key
from services.registry.records import FILES, FileDeletion, FilePurpose, FileRecord
from services.registry.usage import Usage

MAX_FILENAME_CHARS = 255
ID_PREFIX = "file"


class Files:
    """The files of all tenants; each call acts for one."""

    def __init__(self, catalogue: Catalogue, blobs: Blobs, usage: Usage) -> None:
        self._catalogue = catalogue
        self._blobs = blobs
        self._usage = usage

    async def create(
        self,
        tenant: str,
        filename: str,
        purpose: FilePurpose,
        upload: Upload,
        *,
        declared_digest: str,
        file_id: str | None = None,
    ) -> FileRecord:
        """Keep what was uploaded as a file; one that has `file_id` already is returned as it is.

        Raises:
            InvalidArgument: `empty_file` or `digest_mismatch`.
            ResourceExhausted: `quota_exceeded`.
        """
        if upload.size_bytes == 0:
            raise InvalidArgument("empty_file", "The file holds no bytes.", field="data")
        if declared_digest and declared_digest != upload.digest:
            raise digest_mismatch("header.digest", declared_digest, upload.digest)
        await self._usage.check_room(None, tenant, upload.size_bytes)
        record = FileRecord(
            tenant=tenant,
            id=file_id or ids.new_id(ID_PREFIX),
            filename=filename,
            purpose=purpose,
            size_bytes=upload.size_bytes,
            digest=upload.digest,
            create_time_ms=now_ms(),
        )
        with self._blobs.in_use([upload.digest]):
            await self._blobs.keep(upload.digest, upload.path)
            async with self._catalogue.mutation() as mutation:
                [found] = await mutation.query(("HGET", tenant_key(tenant, "files"), record.id))
                if found is not None:
                    return FILES.decode(found)
                await self._usage.check_room(mutation, tenant, record.size_bytes)
                await mutation.append(record)
        return record

    async def get(self, tenant: str, file_id: str) -> FileRecord:
        """Return a file's record. Raises `NotFound` (`file_not_found`)."""
        found = None
        if ids.is_id(ID_PREFIX, file_id):
            [found] = await self._catalogue.query(("HGET", tenant_key(tenant, "files"), file_id))
        if found is None:
            raise _not_found(file_id)
        return FILES.decode(found)

    async def page(
        self, tenant: str, before: str, size: int, purpose: FilePurpose | None
    ) -> tuple[list[FileRecord], bool]:
        """Return up to `size` files, newest first, older than the id `before`, and whether there are more."""
        [found] = await self._catalogue.query(("HGETALL", tenant_key(tenant, "files")))
        ordered = sorted((file_id.decode() for file_id in found), reverse=True)
        records = (
            FILES.decode(found[file_id.encode()]) for file_id in ordered if not before or file_id < before
        )
        wanted = [record for record in records if purpose is None or record.purpose is purpose]
        return wanted[:size], len(wanted) > size

    async def delete(self, tenant: str, file_id: str) -> None:
        """Delete a file. Raises `NotFound` (`file_not_found`)."""
        async with self._catalogue.mutation() as mutation:
            found = None
            if ids.is_id(ID_PREFIX, file_id):
                [found] = await mutation.query(("HGET", tenant_key(tenant, "files"), file_id))
            if found is None:
                raise _not_found(file_id)
            await mutation.append(FileDeletion(tenant, file_id, now_ms()))


def checked_filename(name: str) -> str:
    """Return `name` if it may be shown as a file's name. Raises `InvalidArgument` (`bad_filename`)."""
    is_plain = 0 < len(name) <= MAX_FILENAME_CHARS and name.isprintable() and name not in (".", "..")
    if not is_plain or "/" in name or "\\" in name:
        message = f"A filename has 1 to {MAX_FILENAME_CHARS} printable characters and no path separators."
        raise InvalidArgument(
            "bad_filename", message, field="header.filename", value=name, limit=MAX_FILENAME_CHARS
        )
    return name


def checked_optional_digest(digest: str, field: str) -> str:
    """Return `digest`, which may be empty. Raises `InvalidArgument` (`bad_digest`)."""
    return names.digest(digest, field=field) if digest else digest


def digest_mismatch(field: str, declared: str, actual: str) -> InvalidArgument:
    """The error for bytes that are not those announced."""
    message = f"The bytes that came have the digest {actual}, not {declared}."
    return InvalidArgument("digest_mismatch", message, field=field, value=actual, limit=declared)


def _not_found(file_id: str) -> NotFound:
    shown = file_id[:64]
    return NotFound("file_not_found", f"There is no file {shown!r}.", resource=f"files/{shown}")
