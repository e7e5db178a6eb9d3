"""Where the bytes of each known version are: what the loader threads need to fetch a digest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from services.common.errors import Unavailable

_MAX_SOURCES = 65536


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a version: its SHA-256 as `sha256:<hex>`, and its size."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A version as the registry knows it.

    Attributes:
        tenant: on whose behalf it may be read.
        digest: of the version.
        ref: names the version for ever, `name@sha256:<hex>`.
        version_ref: names it for people, `name:3`.
        max_rank: largest rank of any module.
        files: by name.
    """

    tenant: str
    digest: str
    ref: str
    version_ref: str
    max_rank: int
    files: Mapping[str, SourceFile]


class AdapterSources:
    """The sources of versions by digest, noted when a reference is resolved. Thread-safe and bounded."""

    def __init__(self, limit: int = _MAX_SOURCES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._sources: OrderedDict[str, AdapterSource] = OrderedDict()

    def note(self, source: AdapterSource) -> None:
        """Remember a source; the one that was noted longest ago makes room."""
        with self._lock:
            self._sources[source.digest] = source
            self._sources.move_to_end(source.digest)
            while len(self._sources) > self._limit:
                self._sources.popitem(last=False)

    def get(self, digest: str) -> AdapterSource | None:
        """Return what is known of a digest."""
        with self._lock:
            return self._sources.get(digest)

    def require(self, digest: str) -> AdapterSource:
        """Return the source of a digest.

        Raises:
            Unavailable: `adapter_unavailable` where it was forgotten; asking again notes it anew.
        """
        source = self.get(digest)
        if source is None:
            raise Unavailable(
                "adapter_unavailable", "The adapter must be resolved again.", retry_after_seconds=0.1
            )
        return source
