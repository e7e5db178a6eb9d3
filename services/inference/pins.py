"""Which versions operators have pinned, in a file beside the adapters' disk cache, so that it outlives us."""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from services.inference.sources import AdapterSource

_logger = logging.getLogger("lorafleet.inference")


@dataclass(frozen=True, slots=True)
class _Pin:
    """A pinned version, and the base that it was pinned on."""

    source: AdapterSource
    base_fingerprint_digest: str


class PinRecord:
    """The pins of each tenant, by version digest. Thread-safe; a change is on the disk when it returns.

    One folder may serve several bases in turn: the pins of other bases are kept, and not seen.
    """

    def __init__(self, path: Path, base_fingerprint_digest: str) -> None:
        """Read `path`. A file that cannot be read is moved aside: a service without pins is better than none.

        Raises:
            OSError: the disk failed.
        """
        self._path = path
        self._base = base_fingerprint_digest
        self._lock = threading.Lock()
        self._pins: dict[tuple[str, str], _Pin] = {}
        if path.exists():
            self._read()

    def __contains__(self, source: AdapterSource) -> bool:
        """Whether the tenant of `source` has pinned it."""
        return (source.tenant, source.digest) in self._pins

    def add(self, source: AdapterSource) -> None:
        """Record a pin; OSError where the disk fails."""
        with self._lock:
            self._change(self._pins | {(source.tenant, source.digest): _Pin(source, self._base)})

    def remove(self, source: AdapterSource) -> bool:
        """Forget a pin; return whether another tenant still pins the same bytes. OSError as `add`."""
        with self._lock:
            key = (source.tenant, source.digest)
            if key in self._pins:
                self._change({other: pin for other, pin in self._pins.items() if other != key})
            return any(digest == source.digest for _, digest in self._pins)

    def sources(self) -> list[AdapterSource]:
        """Return what is pinned on this base."""
        with self._lock:
            return [pin.source for pin in self._pins.values() if pin.base_fingerprint_digest == self._base]

    def _read(self) -> None:
        try:
            rows = json.loads(self._path.read_text(encoding="utf-8"))
            pins = [_Pin(AdapterSource.from_json(row["source"]), str(row["base"])) for row in rows]
        except (ValueError, TypeError, KeyError) as error:
            damaged = self._path.with_suffix(".damaged")
            os.replace(self._path, damaged)
            _logger.error(
                "the record of pins cannot be read", extra={"file": damaged.name, "detail": str(error)}
            )
            return
        self._pins = {(pin.source.tenant, pin.source.digest): pin for pin in pins}

    def _change(self, pins: dict[tuple[str, str], _Pin]) -> None:
        """Write `pins`, and only then go by them."""
        rows = [
            {"source": pin.source.to_json(), "base": pin.base_fingerprint_digest} for pin in pins.values()
        ]
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(rows, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        self._pins = pins
