"""The state folder: everything one fleet keeps, in one place that only its owner can read."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

_STATE_VARIABLE = "LORAFLEET_STATE"
_SECRET_BYTES = 32


def default_root() -> Path:
    """Return `$LORAFLEET_STATE`, or `~/.lorafleet`."""
    return Path(os.environ.get(_STATE_VARIABLE) or Path.home() / ".lorafleet")


@dataclass(frozen=True, slots=True)
class StateFolder:
    """Where a fleet keeps what.

    `store/` (the object store) and `valkey/` (its index) are the data; `cache/` holds what can be had again;
    `logs/`, `run/` and `fleet.json` belong to the running; `secrets/` holds one secret in each file.
    """

    root: Path

    def create(self) -> None:
        """Make the folders that are not there."""
        for folder in (self.root, self.valkey, self.store, self.cache, self.logs, self.run, self.secrets):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def valkey(self) -> Path:
        return self.root / "valkey"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def secrets(self) -> Path:
        return self.root / "secrets"

    @property
    def config_file(self) -> Path:
        return self.root / "fleet.json"

    @property
    def status_file(self) -> Path:
        return self.run / "status.json"

    @property
    def lock_file(self) -> Path:
        return self.run / "lock"

    def log_file(self, process: str) -> Path:
        """Return the log of one process of the fleet; Valkey keeps its own, beside its data."""
        folder = self.valkey if process == "valkey" else self.logs
        return folder / f"{process}.log"

    def read_secret(self, name: str) -> str | None:
        """Return a secret, or None where there is none of that name."""
        try:
            return (self.secrets / name).read_text("utf-8").strip()
        except FileNotFoundError:
            return None

    def write_secret(self, name: str, value: str) -> None:
        """Keep a secret in a file that only the owner can read."""
        write_private(self.secrets / name, value + "\n")

    def secret(self, name: str) -> str:
        """Return a secret, drawn at random the first time it is asked for."""
        value = self.read_secret(name)
        if value is None:
            value = secrets.token_hex(_SECRET_BYTES)
            self.write_secret(name, value)
        return value


def write_private(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step, readable by the owner alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
