"""The lock on a state folder: held by the supervisor for as long as it lives, and freed by the kernel."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Self

_RETRY_SECONDS = 0.05


class StateLock:
    """An exclusive lock that ends with the process that holds it, however that process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, *, wait_seconds: float = 1.0) -> Self | None:
        """Take the lock and write this process's id into it; None when another process keeps it.

        `wait_seconds` outlasts the moment in which somebody only looks whether the lock is held.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    return None
                time.sleep(_RETRY_SECONDS)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return cls(descriptor)

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._descriptor)


def holder(path: Path) -> int | None:
    """Return the id of the process that holds the lock, or None where nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(descriptor, 32, 0) or b"0")
    finally:
        os.close(descriptor)
    return None
