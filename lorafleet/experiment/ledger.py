"""What an experiment has done so far, in a file that survives a crash.

One JSON object per line, each written through to the disk before the next step is taken. A last line that
was cut short is what a crash leaves, and is left out when the file is read.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lorafleet.api import Json
from lorafleet.experiment.executor import RunFiles

_VERSION = 1


class LedgerError(Exception):
    """The ledger belongs to something else, or cannot be read."""


class Ledger:
    """The files, submissions and outcomes of an experiment's runs. Use as a context manager."""

    def __init__(self, path: Path, experiment: str) -> None:
        """Open the ledger at `path`, new or not.

        Raises:
            LedgerError: it is another experiment's.
        """
        self._files: dict[str, RunFiles] = {}
        self._runs: dict[str, str] = {}
        self._outcomes: dict[str, Json] = {}
        entries, whole_bytes = _entries(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(whole_bytes)
        if not entries:
            self._write({"ledger": _VERSION, "experiment": experiment})
        elif entries[0] != {"ledger": _VERSION, "experiment": experiment}:
            self._file.close()
            raise LedgerError(f"{path} is not the ledger of the experiment {experiment}")
        for entry in entries[1:]:
            self._take(entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def files(self, cell_digest: str) -> RunFiles | None:
        """Return where the rows of a run lie, if they were placed."""
        return self._files.get(cell_digest)

    def run_id(self, cell_digest: str) -> str | None:
        """Return the id of a run, if it was submitted."""
        return self._runs.get(cell_digest)

    def outcome(self, cell_digest: str) -> Json | None:
        """Return how a run ended, if it did."""
        return self._outcomes.get(cell_digest)

    def placed(self, cell_digest: str, files: RunFiles) -> None:
        """Note where the rows of a run lie."""
        self._note({"cell": cell_digest, "files": asdict(files)})

    def submitted(self, cell_digest: str, run_id: str) -> None:
        """Note a run's id."""
        self._note({"cell": cell_digest, "run": run_id})

    def ended(self, cell_digest: str, outcome: Json) -> None:
        """Note how a run ended."""
        self._note({"cell": cell_digest, "outcome": outcome})

    def _note(self, entry: dict[str, Any]) -> None:
        self._write(entry)
        self._take(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, allow_nan=False).encode("ascii") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _take(self, entry: dict[str, Any]) -> None:
        cell = str(entry["cell"])
        if "files" in entry:
            self._files[cell] = RunFiles(**entry["files"])
        elif "run" in entry:
            self._runs[cell] = str(entry["run"])
        else:
            self._outcomes[cell] = entry["outcome"]


def _entries(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines of the file at `path`, and their bytes."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    whole_bytes = data.rfind(b"\n") + 1
    try:
        return [json.loads(line) for line in data[:whole_bytes].splitlines()], whole_bytes
    except ValueError as error:
        raise LedgerError(f"{path} is no ledger: {error}") from error
