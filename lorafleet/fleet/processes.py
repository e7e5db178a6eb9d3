"""The processes of a fleet: each can be started, looked at and ended, and dies with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorafleet.fleet.logfile import LogPump, RotatingLog
from lorafleet.fleet.ports import HOST
from services.common.config import EXIT_BAD_CONFIGURATION
from services.common.valkey import EmbeddedValkey

_PR_SET_PDEATHSIG = 1
_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended.

    Attributes:
        text: for people, e.g. `exit code 1` or `killed by SIGKILL`.
        is_final: starting it again cannot help.
    """

    text: str
    is_final: bool = False


class Child(Protocol):
    """One process that the supervisor keeps running."""

    @property
    def name(self) -> str:
        """Stable name; also that of its log."""
        ...

    @property
    def pid(self) -> int | None:
        """Process id of the last start; None before the first."""
        ...

    def start(self) -> None:
        """Start the process; raises when that is impossible."""
        ...

    def ending(self) -> Ending | None:
        """Return how the process ended, or None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask the process to end; no effect on one that has ended."""
        ...

    def kill(self) -> None:
        """End the process at once, and what it started; no effect on one that has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Door:
    """An address that stays open while its process is started again: clients wait, and are not refused.

    Attributes:
        port: on loopback.
        variable: by which the process learns the file descriptor of the listening socket.
    """

    port: int
    variable: str


class ServiceProcess:
    """A command whose output goes to a rotating log."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_file: Path,
        pump: LogPump,
        *,
        door: Door | None = None,
    ) -> None:
        self._name = name
        self._door = door
        self._listener: socket.socket | None = None
        self._command = tuple(command)
        self._environment = dict(environment)
        self._log = RotatingLog(log_file)
        # The log of this run begins with this run.
        self._log.begin_anew()
        self._pump = pump
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the command; raises `OSError` when it cannot be run, or its door not be opened."""
        handed_over, environment = self._open_door()
        output = self._pump.attach(self._log)
        try:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment | environment,
                pass_fds=handed_over,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # In a session of its own: Ctrl-C reaches it only through the supervisor, in order.
                start_new_session=True,
                preexec_fn=_death_with(os.getpid()),
            )
        finally:
            os.close(output)

    def ending(self) -> Ending | None:
        assert self._process is not None, f"{self._name} was not started"
        code = self._process.poll()
        if code is None:
            return None
        if code < 0:
            return Ending(f"killed by {signal.Signals(-code).name}")
        is_final = code == EXIT_BAD_CONFIGURATION
        if is_final:
            self._close_door()
        return Ending(f"exit code {code}", is_final=is_final)

    def terminate(self) -> None:
        self._close_door()
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _open_door(self) -> tuple[tuple[int, ...], dict[str, str]]:
        """Return the file descriptors that the process inherits, and the variables that tell it of them."""
        if self._door is None:
            return (), {}
        if self._listener is None:
            self._listener = socket.create_server((HOST, self._door.port), backlog=_BACKLOG)
        descriptor = self._listener.fileno()
        return (descriptor,), {self._door.variable: str(descriptor)}

    def _close_door(self) -> None:
        """Refuse clients from now on; nobody would come for them."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None


class ValkeyProcess:
    """The embedded Valkey server, which writes a log of its own."""

    name = "valkey"

    def __init__(self, directory: Path, port: int) -> None:
        self._directory = directory
        self._port = port
        self._server: EmbeddedValkey | None = None

    @property
    def pid(self) -> int | None:
        return self._server.pid if self._server else None

    def start(self) -> None:
        """Start the server and return when it answers; raises `Unavailable` when it does not."""
        self._server = EmbeddedValkey.start(self._directory, port=self._port)

    def ending(self) -> Ending | None:
        assert self._server is not None, "Valkey was not started"
        return None if self._server.is_running else Ending("ended")

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._server and self._server.is_running:
            os.kill(self._server.pid, number)


def _death_with(parent: int) -> Callable[[], None] | None:
    """Return what a child runs before its program, so that the kernel kills it when `parent` is gone."""
    if sys.platform != "linux":
        return None
    # Looked up before the fork, where loading libraries is safe.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def leash() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return leash
