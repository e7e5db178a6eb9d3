"""The supervisor with small stand-in programs: it restarts, stops in order, and leaves no orphan."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lorafleet.fleet import lock
from lorafleet.fleet.logfile import LogPump
from lorafleet.fleet.ports import HOST, next_free
from lorafleet.fleet.processes import Door, Ending, ServiceProcess, ValkeyProcess
from lorafleet.fleet.state import StateFolder
from lorafleet.fleet.status import FleetStatus, end_leftovers
from lorafleet.fleet.supervisor import Supervisor

SLEEPER = "import time; print('here', flush=True); time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); "
    "time.sleep(60)"
)

PORTER = (
    "import os, socket\n"
    "door = socket.socket(fileno=int(os.environ['DOOR_FD']))\n"
    "while True:\n"
    "    client = door.accept()[0]\n"
    "    client.sendall(b'%d' % os.getpid())\n"
    "    client.close()\n"
)


@pytest.fixture
def state(tmp_path: Path) -> StateFolder:
    folder = StateFolder(tmp_path / "state")
    folder.create()
    return folder


def wait_for(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def said(state: StateFolder, name: str) -> str:
    log = state.log_file(name)
    return log.read_text() if log.exists() else ""


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Running:
    """A supervisor that runs in the main thread of a process of its own."""

    def __init__(self, state: StateFolder, programs: dict[str, str]) -> None:
        self.state = state
        lines = [
            "import os, sys, signal",
            "from pathlib import Path",
            "from lorafleet.fleet.lock import StateLock",
            "from lorafleet.fleet.logfile import LogPump",
            "from lorafleet.fleet.processes import ServiceProcess",
            "from lorafleet.fleet.state import StateFolder",
            "from lorafleet.fleet.supervisor import Supervisor",
            f"state = StateFolder(Path({str(state.root)!r}))",
            "lock = StateLock.take(state.lock_file)",
            "assert lock",
            "pump = LogPump()",
            f"programs = {programs!r}",
            "def child(name, text):",
            "    command = [sys.executable, '-c', text]",
            "    return ServiceProcess(name, command, os.environ, state.log_file(name), pump)",
            "children = [child(name, text) for name, text in programs.items()]",
            "supervisor = Supervisor(children, state, pump, first_pause_seconds=0.1, stop_seconds=1.0)",
            "signal.signal(signal.SIGTERM, lambda *_: supervisor.request_stop())",
            "supervisor.run()",
        ]
        self.process = subprocess.Popen([sys.executable, "-c", "\n".join(lines)])
        wait_for(lambda: all(self.pid(name) for name in programs))

    def pid(self, name: str) -> int:
        status = FleetStatus.load(self.state)
        process = status.process(name) if status else None
        return (process.pid or 0) if process else 0

    def restarts(self, name: str) -> int:
        status = FleetStatus.load(self.state)
        process = status.process(name) if status else None
        assert process is not None
        return process.restarts

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


@pytest.fixture
def start(state: StateFolder) -> Iterator[Callable[[dict[str, str]], Running]]:
    started: list[Running] = []

    def begin(programs: dict[str, str]) -> Running:
        started.append(Running(state, programs))
        return started[-1]

    yield begin
    for running in started:
        running.end()


def test_a_killed_child_is_started_again(start: Callable[[dict[str, str]], Running]) -> None:
    running = start({"one": SLEEPER, "two": SLEEPER})
    first, other = running.pid("one"), running.pid("two")
    wait_for(lambda: "here" in said(running.state, "one"))

    os.kill(first, signal.SIGKILL)

    wait_for(lambda: running.pid("one") not in {0, first})
    status = FleetStatus.load(running.state)
    assert status is not None
    one = status.process("one")
    assert one is not None
    assert (one.restarts, one.last_ending) == (1, "killed by SIGKILL")
    assert running.pid("two") == other
    wait_for(lambda: said(running.state, "one").count("here") == 2)


def test_pauses_between_restarts_grow(start: Callable[[dict[str, str]], Running]) -> None:
    # 0.1, 0.2, 0.4, ... seconds: a program that dies at once cannot be started ten times in a second.
    running = start({"dies": "import sys, time; time.sleep(0.2); sys.exit(1)"})
    time.sleep(1.5)
    assert 1 <= running.restarts("dies") <= 4


def test_bad_configuration_is_not_tried_again(start: Callable[[dict[str, str]], Running]) -> None:
    running = start({"wrong": "import sys, time; time.sleep(0.5); print('bad'); sys.exit(2)"})
    wait_for(lambda: running.pid("wrong") == 0)
    time.sleep(0.5)
    status = FleetStatus.load(running.state)
    assert status is not None
    wrong = status.process("wrong")
    assert wrong is not None
    assert (wrong.state, wrong.restarts, wrong.last_ending) == ("failed", 0, "exit code 2")


def test_stop_ends_every_child_in_reverse_order(
    start: Callable[[dict[str, str]], Running], tmp_path: Path
) -> None:
    goodbye = (
        "import signal, sys, time\n"
        "def leave(*_):\n"
        f"    open({str(tmp_path / 'order')!r}, 'a').write('{{}}\\n')\n"
        "    print('bye', flush=True)\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "print('set', flush=True)\n"
        "time.sleep(60)"
    )
    running = start({name: goodbye.format(name) for name in ("first", "second", "third")})
    names = ("first", "second", "third")
    wait_for(lambda: all("set" in said(running.state, name) for name in names))
    pids = [running.pid(name) for name in names]

    running.process.terminate()

    assert running.process.wait(10) == 0
    assert (tmp_path / "order").read_text().split() == ["third", "second", "first"]
    assert not any(runs(pid) for pid in pids)
    assert "bye" in said(running.state, "first")
    assert lock.holder(running.state.lock_file) is None


def test_a_child_that_does_not_stop_is_killed(start: Callable[[dict[str, str]], Running]) -> None:
    running = start({"stubborn": STUBBORN})
    wait_for(lambda: "deaf" in said(running.state, "stubborn"))
    pid = running.pid("stubborn")
    running.process.terminate()
    assert running.process.wait(10) == 0
    assert not runs(pid)


def test_no_orphan_remains_of_a_killed_supervisor(start: Callable[[dict[str, str]], Running]) -> None:
    running = start({"one": SLEEPER, "stubborn": STUBBORN})
    pids = [running.pid("one"), running.pid("stubborn")]
    assert all(runs(pid) for pid in pids)
    assert lock.holder(running.state.lock_file) == running.process.pid

    running.process.kill()

    wait_for(lambda: not any(runs(pid) for pid in pids))
    running.process.wait(10)
    assert lock.holder(running.state.lock_file) is None


def test_leftovers_are_ended_and_strangers_spared(state: StateFolder) -> None:
    # A process that outlived its supervisor, and one that merely has the id of a former child.
    pump = LogPump()
    child = ServiceProcess(
        "left", [sys.executable, "-c", SLEEPER], dict(os.environ), state.log_file("left"), pump
    )
    supervisor = Supervisor([child], state, pump)
    threading.Timer(0.3, supervisor.request_stop).start()
    stranger = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.DEVNULL)
    left = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.DEVNULL)
    supervisor.run()
    status = FleetStatus.load(state)
    assert status is not None
    recorded = status.processes[0]
    try:
        end_leftovers(
            status.model_copy(
                update={
                    "processes": (
                        recorded.model_copy(
                            update={
                                "pid": left.pid,
                                "started_at": psutil.Process(left.pid).create_time(),
                            }
                        ),
                        recorded.model_copy(update={"pid": stranger.pid, "started_at": 1.0}),
                    )
                }
            )
        )
        assert not runs(left.pid)
        assert runs(stranger.pid)
    finally:
        for process in (stranger, left):
            process.kill()
            process.wait()


def test_valkey_is_a_child_like_the_others(state: StateFolder) -> None:
    valkey = ValkeyProcess(state.valkey, 0)
    valkey.start()
    assert valkey.ending() is None
    assert valkey.pid
    valkey.kill()
    wait_for(lambda: valkey.ending() is not None)
    valkey.start()
    assert valkey.ending() is None
    valkey.terminate()
    wait_for(lambda: valkey.ending() is not None)


def test_clients_wait_at_the_door_while_a_process_is_started_again(state: StateFolder) -> None:
    pump, port = LogPump(), next_free(20_000)
    command, log = [sys.executable, "-c", PORTER], state.log_file("porter")
    child = ServiceProcess("porter", command, os.environ, log, pump, door=Door(port, "DOOR_FD"))

    def knock() -> socket.socket:
        return socket.create_connection((HOST, port), timeout=10)

    def pid_from(client: socket.socket) -> int:
        with client:
            return int(client.recv(100))

    child.start()
    try:
        first = pid_from(knock())
        assert first == child.pid
        child.kill()
        wait_for(lambda: child.ending() is not None)
        waiting = [knock() for _ in range(3)]
        child.start()
        assert child.pid != first
        assert [pid_from(client) for client in waiting] == [child.pid] * 3
    finally:
        child.terminate()
        wait_for(lambda: child.ending() is not None)
        pump.close()
    with pytest.raises(ConnectionRefusedError):
        knock()


def test_the_door_of_a_process_that_cannot_start_is_closed(state: StateFolder) -> None:
    pump, port = LogPump(), next_free(20_000)
    command, log = [sys.executable, "-c", "import sys; sys.exit(2)"], state.log_file("wrong")
    child = ServiceProcess("wrong", command, os.environ, log, pump, door=Door(port, "DOOR_FD"))
    child.start()
    wait_for(lambda: child.ending() == Ending("exit code 2", is_final=True))
    pump.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), timeout=10)
