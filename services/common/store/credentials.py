"""Credentials of an S3 store in a file, read again whenever it changes: a rotated secret needs no restart."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from minio.credentials.credentials import Credentials
from minio.credentials.providers import Provider

from services.common import metrics
from services.common.errors import Unavailable
from services.common.store.interface import RETRY_AFTER_SECONDS

_logger = logging.getLogger("lorafleet.store")
_reads = metrics.counter("lorafleet.store.credential_reads")

_Version = tuple[int, int, int]


class FileCredentials(Provider):  # type: ignore[misc] # the client is not typed there
    """Reads `{"access_key": "...", "secret_key": "..."}` from `path`.

    While the file is missing or half written, the credentials of before stay in use. Whoever rotates them
    puts a new file in place of the old one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: _Version | None = None
        self._credentials: Credentials | None = None

    def retrieve(self) -> Credentials:
        """Return the credentials of now.

        Raises:
            Unavailable: `store_unavailable`, where none were ever read.
        """
        try:
            status = self._path.stat()
            version = (status.st_mtime_ns, status.st_size, status.st_ino)
            if version != self._version:
                self._credentials = _read(self._path)
                self._version = version
                _reads.add(1)
                _logger.info("store credentials read", extra={"path": str(self._path)})
        except (OSError, ValueError) as error:
            # What went wrong is named, never what the file holds.
            reason = type(error).__name__
            _reads.add(1, {"error.type": reason})
            _logger.error(
                "store credentials cannot be read", extra={"path": str(self._path), "reason": reason}
            )
        if self._credentials is None:
            raise Unavailable(
                "store_unavailable",
                f"The store credentials in {self._path} cannot be read.",
                resource="object store",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        return self._credentials


def _read(path: Path) -> Credentials:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or set(found) != {"access_key", "secret_key"}:
        raise ValueError("must hold access_key and secret_key, and nothing else")
    if not all(isinstance(value, str) and value for value in found.values()):
        raise ValueError("access_key and secret_key must be text")
    return Credentials(found["access_key"], found["secret_key"])
