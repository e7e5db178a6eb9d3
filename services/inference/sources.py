"""Where the bytes of each known version are: what the loader threads need to fetch a digest."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass

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
        traceparent: W3C trace context of its publication; empty where that was not traced.
    """

    tenant: str
    digest: str
    ref: str
    version_ref: str
    max_rank: int
    files: Mapping[str, SourceFile]
    traceparent: str = ""

    @property
    def adapter(self) -> str:
        """The adapter's name."""
        return self.ref.partition("@")[0]

    def to_json(self) -> str:
        """Return it as text for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> AdapterSource:
        """Return what `to_json` has written.

        Raises:
            ValueError: it is not that.
        """
        fields = json.loads(text)
        try:
            files = {
                str(name): SourceFile(str(file["digest"]), int(file["size_bytes"]))
                for name, file in fields.pop("files").items()
            }
            source = cls(**fields, files=files)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not an adapter's source: {error}") from error
        texts = (source.tenant, source.digest, source.ref, source.version_ref, source.traceparent)
        if not all(isinstance(text, str) for text in texts) or not isinstance(source.max_rank, int):
            raise ValueError("not an adapter's source: a field is of the wrong type")
        return source


class AdapterSources:
    """The sources of versions by digest and tenant, noted when a reference is resolved. Thread-safe and
    bounded.

    Tenants who published the same bytes share a digest, and so one copy in every tier; each knows it by a
    name of its own.
    """

    def __init__(self, limit: int = _MAX_SOURCES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._sources: OrderedDict[tuple[str, str], AdapterSource] = OrderedDict()
        self._by_digest: dict[str, dict[str, AdapterSource]] = {}

    def note(self, source: AdapterSource) -> None:
        """Remember a source; the one that was noted longest ago makes room."""
        key = (source.digest, source.tenant)
        with self._lock:
            self._sources[key] = source
            self._sources.move_to_end(key)
            tenants = self._by_digest.setdefault(source.digest, {})
            tenants.pop(source.tenant, None)
            tenants[source.tenant] = source
            while len(self._sources) > self._limit:
                self._forget(*self._sources.popitem(last=False)[0])

    def get(self, digest: str, tenant: str | None = None) -> AdapterSource | None:
        """Return what is known of a digest: to `tenant`, or to whoever asked for it last."""
        with self._lock:
            known = self._by_digest.get(digest, {})
            return next(reversed(known.values()), None) if tenant is None else known.get(tenant)

    def of_tenant(self, tenant: str) -> dict[str, AdapterSource]:
        """Return all that is known to a tenant, by digest."""
        with self._lock:
            return {digest: source for (digest, owner), source in self._sources.items() if owner == tenant}

    def _forget(self, digest: str, tenant: str) -> None:
        tenants = self._by_digest[digest]
        del tenants[tenant]
        if not tenants:
            del self._by_digest[digest]

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
