"""The object store in a bucket of S3 or anything that speaks it, through the MinIO client."""

from __future__ import annotations

import contextlib
import datetime
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from services.common.errors import ResourceExhausted, Unavailable
from services.common.store.interface import (
    STREAM_CHUNK_BYTES,
    ObjectExistsError,
    ObjectNotFoundError,
    ObjectStat,
    checked_key,
    checked_prefix,
)

_PART_BYTES: Final = 8 * 1024 * 1024
_MISSING: Final = frozenset({"NoSuchKey", "NoSuchObject"})
_OWNED: Final = frozenset({"BucketAlreadyOwnedByYou", "BucketAlreadyExists"})
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


class S3Store:
    """Objects in one bucket.

    Nothing overwrites anything under a key that matters: records have keys that never repeat, blobs keys that
    name their content. So plain PUT is enough, and no conditional write of the server is relied on.

    Args:
        endpoint: `host:port` of the server.
        bucket: its bucket; `ready` creates it where it is missing.
        access_key, secret_key: credentials.
        secure: HTTPS instead of HTTP.
        region: spares the client a question per bucket.
        connect_timeout_seconds, read_timeout_seconds: how long one request may wait.
        retries: how often a failed request is sent again; every request here is safe to repeat.
        connections: kept open at most.
    """

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        *,
        access_key: str,
        secret_key: str,
        secure: bool,
        region: str = "us-east-1",
        connect_timeout_seconds: float = 5.0,
        read_timeout_seconds: float = 60.0,
        retries: int = 2,
        connections: int = 16,
    ) -> None:
        self._bucket = bucket
        self._retries = retries
        self._pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=connect_timeout_seconds, read=read_timeout_seconds),
            maxsize=connections,
            retries=urllib3.Retry(total=retries, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]),
        )
        self._client = Minio(
            endpoint, access_key, secret_key, secure=secure, region=region, http_client=self._pool
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
                self._client.put_object(self._bucket, key, reader, -1, part_size=_PART_BYTES)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        """Store the bytes of the file at `path`; see `ObjectStore.put_file`."""
        checked_key(key)
        self._refuse_existing(key, if_absent)
        with path.open("rb") as file, _translated():
            size_bytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            self._client.put_object(self._bucket, key, file, size_bytes, part_size=_PART_BYTES)

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
                yield from response.stream(STREAM_CHUNK_BYTES)
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
        message = f"The object store answered {error.code}" + (f": {explanation}." if explanation else ".")
        raise Unavailable("store_unavailable", message, resource="object store") from error
    except _CUT as error:
        if key is not None:
            # A stream goes on from where it was cut.
            raise
        raise _unreachable(error) from error
    except (MinioException, urllib3.exceptions.HTTPError) as error:
        raise _unreachable(error) from error


def _unreachable(error: Exception) -> Unavailable:
    message = f"The object store cannot be reached ({type(error).__name__})."
    return Unavailable("store_unavailable", message, resource="object store")
