"""The object store in a bucket of S3 or anything that speaks it, through the MinIO client."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import io
import logging
import time
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Final

import urllib3
from minio import Minio
from minio.credentials.providers import Provider
from minio.error import MinioException, S3Error
from urllib3.response import BaseHTTPResponse

from services.common.errors import ResourceExhausted, Unavailable
from services.common.store.interface import (
    RETRY_AFTER_SECONDS,
    STREAM_CHUNK_BYTES,
    ObjectExistsError,
    ObjectNotFoundError,
    ObjectStat,
    checked_key,
    checked_prefix,
)

# What goes in parts is held in memory part by part, so parts are the smallest that S3 takes.
_PART_BYTES: Final = 5 * 1024 * 1024
_SINGLE_PUT_BYTES: Final = 5 * 1024**3
_URL_LIFE: Final = datetime.timedelta(hours=1)
_MISSING: Final = frozenset({"NoSuchKey", "NoSuchObject"})
_OWNED: Final = frozenset({"BucketAlreadyOwnedByYou", "BucketAlreadyExists"})
_TRY_AGAIN: Final = (429, 500, 502, 503, 504)
_MAX_RETRY_AFTER_SECONDS: Final = 5
_FULL: Final = frozenset({"XMinioStorageFull", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded"})
_BAD_RANGE: Final = "InvalidRange"
_CUT: Final = (urllib3.exceptions.ProtocolError, urllib3.exceptions.ReadTimeoutError)
_EXPLAINED: Final = {
    "RequestTimeTooSkewed": "the clocks of this machine and of the store are too far apart",
    "AccessDenied": "the credentials may not do this",
    "InvalidAccessKeyId": "it does not know the access key",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "SlowDown": "it is overloaded",
}

_logger = logging.getLogger("lorafleet.store")


class S3Store:
    """Objects in one bucket.

    Nothing overwrites anything under a key that matters: records have keys that never repeat, blobs keys that
    name their content. So plain PUT is enough, and no conditional write of the server is relied on.

    Args:
        endpoint: `host:port` of the server.
        bucket: its bucket; `ready` creates it where it is missing.
        credentials: asked anew for each request.
        secure: HTTPS instead of HTTP.
        region: spares the client a question per bucket.
        connect_timeout_seconds, read_timeout_seconds: how long one request may wait.
        chunk_timeout_seconds: how long `STREAM_CHUNK_BYTES` of an answer may take; a store that trickles
            would otherwise hold its reader for hours.
        retries: how often a failed request is sent again, after a growing pause with jitter; every request
            here is safe to repeat.
        connections: kept open at most.
    """

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        *,
        credentials: Provider,
        secure: bool,
        region: str = "us-east-1",
        connect_timeout_seconds: float = 5.0,
        read_timeout_seconds: float = 30.0,
        chunk_timeout_seconds: float = 15.0,
        retries: int = 2,
        connections: int = 16,
    ) -> None:
        self._bucket = bucket
        self._retries = retries
        self._chunk_timeout_seconds = chunk_timeout_seconds
        self._pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=connect_timeout_seconds, read=read_timeout_seconds),
            maxsize=connections,
            blocksize=STREAM_CHUNK_BYTES,
            retries=urllib3.Retry(
                total=retries,
                allowed_methods=None,
                status_forcelist=_TRY_AGAIN,
                raise_on_status=False,
                backoff_factor=0.2,
                backoff_jitter=0.2,
                retry_after_max=_MAX_RETRY_AFTER_SECONDS,
            ),
        )
        self._client = Minio(
            endpoint, secure=secure, region=region, http_client=self._pool, credentials=credentials
        )

    @property
    def scratch_dir(self) -> None:
        """Nowhere: everything travels; see `ObjectStore.scratch_dir`."""
        return

    def ready(self) -> None:
        """Create the bucket where it is missing."""
        with _translated():
            if not self._client.bucket_exists(self._bucket):
                try:
                    self._client.make_bucket(self._bucket)
                except S3Error as error:
                    # Another service of the fleet was faster.
                    if error.code not in _OWNED:
                        raise

    def put(self, key: str, data: bytes | Iterable[bytes], *, if_absent: bool = False) -> None:
        """Store `data`; see `ObjectStore.put`."""
        checked_key(key)
        self._refuse_existing(key, if_absent)
        with _translated():
            if isinstance(data, bytes):
                self._client.put_object(self._bucket, key, io.BytesIO(data), len(data), part_size=_PART_BYTES)
            else:
                reader = _ChunkReader(iter(data))
                self._put_parts(key, reader, -1)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        """Store the bytes of the file at `path`; see `ObjectStore.put_file`."""
        checked_key(key)
        self._refuse_existing(key, if_absent)
        with path.open("rb") as file, _translated():
            size_bytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            if size_bytes <= _SINGLE_PUT_BYTES:
                self._put_whole(key, file, size_bytes)
            else:
                self._put_parts(key, file, size_bytes)

    def move_file(self, key: str, path: Path) -> None:
        """Store the bytes of the file at `path`; see `ObjectStore.move_file`."""
        self.put_file(key, path)

    def get(self, key: str) -> bytes:
        """Return the bytes of an object; see `ObjectStore.get`."""
        return b"".join(self.stream(key))

    def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yield bytes of an object, across cut connections; see `ObjectStore.stream`."""
        checked_key(key)
        end = None if length is None else offset + length
        cuts = 0
        while True:
            try:
                for chunk in self._stream_once(key, offset, None if end is None else end - offset):
                    yield chunk
                    offset += len(chunk)
            except _CUT as error:
                cuts += 1
                if cuts > self._retries:
                    raise _unreachable(error) from error
            else:
                return

    def _put_whole(self, key: str, file: io.BufferedReader, size_bytes: int) -> None:
        """Send a file as one request, read as it is sent; the client's own call would hold it in memory.

        The server compares what it got with the MD5.
        """
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()
        file.seek(0)
        response = self._pool.urlopen(
            "PUT",
            self._client.presigned_put_object(self._bucket, key, expires=_URL_LIFE),
            body=file,
            headers={
                "Content-Length": str(size_bytes),
                "Content-MD5": base64.b64encode(digest).decode(),
                "Content-Type": "application/octet-stream",
            },
        )
        if response.status != HTTPStatus.OK:
            raise S3Error.fromxml(response) if response.data else _unreachable(response.status)

    def _put_parts(self, key: str, data: io.BufferedReader | _ChunkReader, size_bytes: int) -> None:
        self._client.put_object(
            self._bucket, key, data, size_bytes, part_size=_PART_BYTES, num_parallel_uploads=1
        )

    def _chunks(self, response: BaseHTTPResponse) -> Iterator[bytes]:
        while True:
            pieces: list[bytes] = []
            missing_bytes = STREAM_CHUNK_BYTES
            deadline = time.monotonic() + self._chunk_timeout_seconds
            while missing_bytes > 0 and (piece := response.read1(missing_bytes)):
                pieces.append(piece)
                missing_bytes -= len(piece)
                if time.monotonic() > deadline:
                    raise _too_slow(self._chunk_timeout_seconds)
            if not pieces:
                return
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _stream_once(self, key: str, offset: int, length: int | None) -> Iterator[bytes]:
        # To the client, length 0 means "to the end".
        if length == 0:
            self.stat(key)
            return
        with _translated(key):
            try:
                response = self._client.get_object(self._bucket, key, offset=offset, length=length or 0)
            except S3Error as error:
                if error.code == _BAD_RANGE:
                    return
                raise
            try:
                yield from self._chunks(response)
            finally:
                response.close()
                response.release_conn()

    def stat(self, key: str) -> ObjectStat:
        """Return size and time of an object; see `ObjectStore.stat`."""
        with _translated(key):
            found = self._client.stat_object(self._bucket, checked_key(key))
            return ObjectStat(key, found.size, found.last_modified.timestamp())

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectStat]:
        """Yield the objects under `prefix`; see `ObjectStore.list`."""
        checked_prefix(prefix)
        with _translated():
            for found in self._client.list_objects(
                self._bucket, prefix=prefix, recursive=True, start_after=start_after or None
            ):
                yield ObjectStat(found.object_name, found.size, found.last_modified.timestamp())

    def delete(self, key: str) -> None:
        """Remove an object; see `ObjectStore.delete`."""
        with _translated():
            self._client.remove_object(self._bucket, checked_key(key))

    def sweep(self, *, older_than_seconds: float) -> int:
        """Abort multipart uploads that were never completed; see `ObjectStore.sweep`."""
        oldest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=older_than_seconds)
        num_swept = 0
        marker: str | None = None
        with _translated():
            while True:
                # The client has no public call for either step.
                page = self._client._list_multipart_uploads(self._bucket, key_marker=marker)
                for upload in page.uploads:
                    if upload.initiated_time < oldest:
                        self._client._abort_multipart_upload(
                            self._bucket, upload.object_name, upload.upload_id
                        )
                        num_swept += 1
                if not page.is_truncated or not page.next_key_marker:
                    return num_swept
                marker = page.next_key_marker

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def _refuse_existing(self, key: str, if_absent: bool) -> None:
        if if_absent:
            with contextlib.suppress(ObjectNotFoundError):
                self.stat(key)
                raise ObjectExistsError(key)


class _ChunkReader:
    """A file of unknown length over chunks of any size."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size_bytes: int) -> bytes:
        """Return up to `size_bytes` bytes, and nothing at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = chunk
        result, self._rest = self._rest[:size_bytes], self._rest[size_bytes:]
        return result


@contextlib.contextmanager
def _translated(key: str | None = None) -> Iterator[None]:
    try:
        yield
    except S3Error as error:
        if key is not None and error.code in _MISSING:
            raise ObjectNotFoundError(key) from error
        if error.code in _FULL:
            message = "The object store has no room left."
            raise ResourceExhausted("storage_full", message, resource="object store") from error
        explanation = _EXPLAINED.get(error.code)
        if error.code in _EXPLAINED:
            _logger.error("the object store refuses", extra={"code": error.code, "detail": explanation})
        message = f"The object store answered {error.code}" + (f": {explanation}." if explanation else ".")
        raise Unavailable(
            "store_unavailable", message, resource="object store", retry_after_seconds=RETRY_AFTER_SECONDS
        ) from error
    except _CUT as error:
        if key is not None:
            # A stream goes on from where it was cut.
            raise
        raise _unreachable(error) from error
    except (MinioException, urllib3.exceptions.HTTPError) as error:
        raise _unreachable(error) from error


def _unreachable(error: Exception | int) -> Unavailable:
    what = f"HTTP {error}" if isinstance(error, int) else type(error).__name__
    message = f"The object store cannot be reached ({what})."
    return Unavailable(
        "store_unavailable", message, resource="object store", retry_after_seconds=RETRY_AFTER_SECONDS
    )


def _too_slow(seconds: float) -> Unavailable:
    message = f"The object store sent less than {STREAM_CHUNK_BYTES} bytes in {seconds:g} s."
    return Unavailable(
        "store_unavailable", message, resource="object store", retry_after_seconds=RETRY_AFTER_SECONDS
    )
