"""What the supervisor tells about its processes, in a file of the state folder."""

from __future__ import annotations

import time
from typing import Literal, Self

import psutil
from pydantic import BaseModel, ConfigDict

from lorafleet.fleet.state import StateFolder, write_private

ProcessState = Literal["starting", "running", "waiting", "failed", "stopped"]
_LEFTOVER_SECONDS = 5.0
_POLL_SECONDS = 0.05
# Two readings of one process's start differ by no more than the kernel's clock tick.
_START_TOLERANCE_SECONDS = 0.1


class ProcessStatus(BaseModel):
    """One process: `waiting` is to be started again after a pause, `failed` is given up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    state: ProcessState
    pid: int | None = None
    started_at: float | None = None
    """Unix time, as the kernel counts it."""
    restarts: int = 0
    last_ending: str | None = None


class FleetStatus(BaseModel):
    """All processes of a fleet and the supervisor that keeps them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    supervisor_pid: int
    processes: tuple[ProcessStatus, ...]

    @classmethod
    def load(cls, state: StateFolder) -> Self | None:
        """Return what the last supervisor wrote, or None where there was none."""
        try:
            return cls.model_validate_json(state.status_file.read_text("utf-8"))
        except FileNotFoundError:
            return None

    def save(self, state: StateFolder) -> None:
        """Replace the status file."""
        write_private(state.status_file, self.model_dump_json(indent=2) + "\n")

    def process(self, name: str) -> ProcessStatus | None:
        """Return the status of one process."""
        return next((process for process in self.processes if process.name == name), None)


def start_time(pid: int) -> float | None:
    """Return when the process with this id started, or None where there is none."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def end_leftovers(status: FleetStatus) -> None:
    """See off the children of a supervisor that was killed.

    The kernel kills them with their parent; this waits for that to have happened, and does it itself where
    the kernel cannot.
    """
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    left = [process for recorded in status.processes if (process := _alive(recorded))]
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        left = [process for process in left if _runs(process)]
    for process in left:
        process.kill()
        process.wait(_LEFTOVER_SECONDS)


def _alive(recorded: ProcessStatus) -> psutil.Process | None:
    """Return the process that `recorded` tells of if it still runs, and not another one with its id."""
    if recorded.pid is None or recorded.started_at is None:
        return None
    started_at = start_time(recorded.pid)
    if started_at is None or abs(started_at - recorded.started_at) > _START_TOLERANCE_SECONDS:
        return None
    try:
        process = psutil.Process(recorded.pid)
    except psutil.NoSuchProcess:
        return None
    return process if _runs(process) else None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
