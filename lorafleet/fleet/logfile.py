"""Log files of bounded size, fed from the pipes of child processes by one thread that never waits on them."""

from __future__ import annotations

import logging
import os
import selectors
from pathlib import Path

_logger = logging.getLogger("lorafleet.fleet")

MAX_BYTES = 10 * 1024 * 1024
KEPT_FILES = 3
_READ_BYTES = 64 * 1024
_TAIL_BYTES = 4096


class RotatingLog:
    """An appended file; at `max_bytes` it becomes NAME.1, the old NAME.1 becomes NAME.2, and so on."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, kept_files: int = KEPT_FILES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._kept_files = kept_files

    def write(self, data: bytes) -> None:
        """Append `data`; it is in the file when this returns."""
        size_bytes = self._path.stat().st_size if self._path.exists() else 0
        if size_bytes + len(data) > self._max_bytes:
            self.begin_anew()
        with self._path.open("ab") as file:
            file.write(data)

    def begin_anew(self) -> None:
        """Put what was written so far aside, if anything was."""
        if not self._path.exists() or self._path.stat().st_size == 0:
            return
        for number in range(self._kept_files - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            if older.exists():
                older.replace(self._path.with_name(f"{self._path.name}.{number + 1}"))
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))


class LogPump:
    """Moves what children write into their logs."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def attach(self, log: RotatingLog) -> int:
        """Return the write end of a new pipe whose bytes go to `log`; the caller closes it after the fork."""
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        self._selector.register(read_end, selectors.EVENT_READ, log)
        return write_end

    def run(self, timeout_seconds: float) -> None:
        """Wait up to `timeout_seconds` for output, and write what has come."""
        for key, _ in self._selector.select(timeout_seconds):
            data = os.read(key.fd, _READ_BYTES)
            if data:
                _write(key.data, data)
            else:
                self._selector.unregister(key.fd)
                os.close(key.fd)

    def close(self) -> None:
        """Write what is left in the pipes and close them."""
        while self._selector.get_map() and self._selector.select(0):
            self.run(0)
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()


def _write(log: RotatingLog, data: bytes) -> None:
    try:
        log.write(data)
    except OSError as error:
        # A full disk must stop neither the child, by a full pipe, nor the supervisor.
        _logger.warning("log lines are lost", extra={"lost_bytes": len(data), "error": str(error)})


def tail(path: Path, *, lines: int = 15) -> str:
    """Return the last lines of a log, or an empty string where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
