"""The stages of a load, and how long each took."""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stage(enum.Enum):
    """What a load does, in order.

    DOWNLOAD is the registry's part, VERIFY the hashing of the bytes, wherever it happens, PARSE the way from
    the file to tensors in host memory, COPY the way into page-locked memory, from which a GPU reads.
    """

    DOWNLOAD = "download"
    VERIFY = "verify"
    PARSE = "parse"
    COPY = "copy"


class LoadTimes:
    """Seconds per stage of one load; a stage that did not happen has none."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = {}

    @property
    def seconds(self) -> Mapping[Stage, float]:
        """Seconds by stage."""
        return self._seconds

    @property
    def total_seconds(self) -> float:
        """Seconds of all stages."""
        return sum(self._seconds.values())

    def add(self, stage: Stage, seconds: float) -> None:
        """Add time to a stage."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def reload_seconds(self, *, from_disk: bool) -> float:
        """Return what the next load will take: without the download where the disk still has the bytes."""
        saved = self._seconds.get(Stage.DOWNLOAD, 0.0) + self._seconds.get(Stage.VERIFY, 0.0)
        return self.total_seconds - (saved if from_disk else 0.0)

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Count the body's time; a body that raises counts too."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)
