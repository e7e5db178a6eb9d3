"""Scratch folders for bytes on their way in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.common.store.disk_errors import disk_errors


class Scratch:
    """Makes folders under `parent`, made where it is missing; None is the system's temporary folder."""

    def __init__(self, parent: Path | None) -> None:
        self._parent = parent

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield a new folder that is removed at the end.

        Raises:
            ResourceExhausted, Unavailable: as `disk_errors`, for everything that is done inside.
        """
        with disk_errors("scratch disk"):
            if self._parent is not None:
                self._parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="lorafleet-", dir=self._parent) as folder:
                yield Path(folder)
