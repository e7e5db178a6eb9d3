"""Who may write to a job: a lease with a fencing token, held in the index.

Tokens of one job only grow. A lease is `token|holder` under a key that expires; every append checks its
token, so a holder that was thought dead and was not cannot write any more.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds leases, named so that others on the same machine can tell whether it is alive."""

    machine: str
    pid: int
    started: int

    @classmethod
    def this_process(cls) -> Holder:
        """Return the present process."""
        return cls(_machine(), os.getpid(), _start_time(os.getpid()))

    @classmethod
    def parse(cls, text: str) -> Holder:
        """Return the holder in what `str()` made."""
        machine, pid, started = text.rsplit("/", 2)
        return cls(machine, int(pid), int(started))

    def __str__(self) -> str:
        return f"{self.machine}/{self.pid}/{self.started}"

    def is_known_dead(self) -> bool:
        """Return whether this process ran here and has ended. One elsewhere is never known to be dead."""
        if self.machine != _machine():
            return False
        try:
            return _start_time(self.pid) != self.started
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write to one job, until it expires or is taken over."""

    job_id: str
    token: int
    holder: Holder


def _start_time(pid: int) -> int:
    process = psutil.Process(pid)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(pid)
    return int(process.create_time() * 1000)


def _machine() -> str:
    """Name the machine by its boot and its process namespace: pids mean the same only where both agree."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    namespace = os.readlink("/proc/self/ns/pid").rpartition("[")[2].rstrip("]")
    return f"{socket.gethostname()}:{boot}:{namespace}"
