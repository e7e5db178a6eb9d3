"""Keeps the processes of a fleet running until it is told to stop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lorafleet.fleet.logfile import LogPump
from lorafleet.fleet.processes import Child, Ending
from lorafleet.fleet.state import StateFolder
from lorafleet.fleet.status import FleetStatus, ProcessState, ProcessStatus, start_time
from services.common.errors import LorafleetError

_logger = logging.getLogger("lorafleet.fleet")

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
# A process that ran this long was well: its next pause is the first one again.
WELL_SECONDS = 60.0
STOP_SECONDS = 25.0
_TICK_SECONDS = 0.1


@dataclass(slots=True)
class _Kept:
    """A child and what the supervisor remembers of it; times are of the monotonic clock."""

    child: Child
    state: ProcessState = "starting"
    started_at: float = 0.0
    start_again_at: float = 0.0
    pause_seconds: float = FIRST_PAUSE_SECONDS
    restarts: int = 0
    last_ending: str | None = None


class Supervisor:
    """Starts children in order, starts them again when they die, and stops them in reverse order.

    It belongs to one thread, the process's main one: the kernel ties the children's lives to the thread that
    started them.
    """

    def __init__(
        self,
        children: Sequence[Child],
        state: StateFolder,
        pump: LogPump,
        *,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        stop_seconds: float = STOP_SECONDS,
    ) -> None:
        self._kept = [_Kept(child, pause_seconds=first_pause_seconds) for child in children]
        self._state = state
        self._pump = pump
        self._first_pause_seconds = first_pause_seconds
        self._stop_seconds = stop_seconds
        self._is_stopping = False

    def request_stop(self) -> None:
        """Make `run` stop the children and return; may be called from a signal handler."""
        self._is_stopping = True

    def run(self) -> None:
        """Keep the children running until `request_stop`, then stop them."""
        for kept in self._kept:
            self._start(kept)
        while not self._is_stopping:
            self._pump.run(_TICK_SECONDS)
            self.look_after()
        self._stop_all()

    def look_after(self) -> None:
        """Take note of children that died, and start those whose pause is over."""
        for kept in self._kept:
            if kept.state == "running" and (ending := kept.child.ending()):
                self._ended(kept, ending)
            elif kept.state == "waiting" and time.monotonic() >= kept.start_again_at:
                kept.restarts += 1
                self._start(kept)

    def _start(self, kept: _Kept) -> None:
        kept.started_at = time.monotonic()
        try:
            kept.child.start()
        except (OSError, LorafleetError) as error:
            self._ended(kept, Ending(f"not started: {error}"))
            return
        kept.state = "running"
        _logger.info("started", extra={"child": kept.child.name, "pid": kept.child.pid})
        self._publish()

    def _ended(self, kept: _Kept, ending: Ending) -> None:
        now = time.monotonic()
        if now - kept.started_at >= WELL_SECONDS:
            kept.pause_seconds = self._first_pause_seconds
        kept.last_ending = ending.text
        kept.state = "failed" if ending.is_final else "waiting"
        kept.start_again_at = now + kept.pause_seconds
        _logger.warning(
            "ended",
            extra={"child": kept.child.name, "ending": ending.text, "pause_seconds": kept.pause_seconds},
        )
        kept.pause_seconds = min(LONGEST_PAUSE_SECONDS, kept.pause_seconds * 2)
        self._publish()

    def _stop_all(self) -> None:
        for kept in reversed(self._kept):
            if kept.state == "running":
                self._stop(kept.child)
            kept.state = "stopped"
            self._publish()
        self._pump.close()

    def _stop(self, child: Child) -> None:
        """End one child, writing its last words while it takes its time."""
        child.terminate()
        deadline = time.monotonic() + self._stop_seconds
        while child.ending() is None:
            if time.monotonic() > deadline:
                _logger.warning("killed, as it did not stop", extra={"child": child.name})
                child.kill()
            self._pump.run(_TICK_SECONDS)
        _logger.info("stopped", extra={"child": child.name})

    def _publish(self) -> None:
        status = FleetStatus(
            supervisor_pid=os.getpid(), processes=tuple(_status(kept) for kept in self._kept)
        )
        try:
            status.save(self._state)
        except OSError as error:
            # A full disk is no reason to end the fleet.
            _logger.warning("the status file is out of date", extra={"error": str(error)})


def _status(kept: _Kept) -> ProcessStatus:
    pid = kept.child.pid if kept.state == "running" else None
    return ProcessStatus(
        name=kept.child.name,
        state=kept.state,
        pid=pid,
        started_at=start_time(pid) if pid else None,
        restarts=kept.restarts,
        last_ending=kept.last_ending,
    )
