"""Start, watch and stop the supervisor of a state folder from another process."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorafleet.fleet import lock, ports
from lorafleet.fleet.config import FleetConfig, Wishes, settle
from lorafleet.fleet.errors import FleetError
from lorafleet.fleet.logfile import tail
from lorafleet.fleet.services import SERVICES, environment
from lorafleet.fleet.state import StateFolder
from lorafleet.fleet.status import FleetStatus, end_leftovers
from services.common.probe import is_ready

API_KEY_SECRET = "api_key"  # noqa: S105 - the name of a file
TENANT = "default"
READY_SECONDS = 180.0
STOP_SECONDS = 120.0
# What inference and trainer cannot do without, and the light installation does not have.
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft")
_KEY = re.compile(r"\blf-[A-Za-z0-9_-]{16,}")
_KEY_SECONDS = 60.0
_POLL_SECONDS = 0.25
# A process that was started this often and never became ready will not heal by waiting.
_HOPELESS_RESTARTS = 4


@dataclass(frozen=True, slots=True)
class Fleet:
    """A fleet that is ready, or was when this was made."""

    state: StateFolder
    config: FleetConfig
    supervisor_pid: int
    api_key: str
    was_running: bool

    @property
    def base_url(self) -> str:
        """What OpenAI clients take as their base URL."""
        return f"{self.config.url}/v1"


Readiness = Mapping[str, bool]
Watcher = Callable[[Readiness], None]


def up(
    state: StateFolder,
    wishes: Wishes,
    *,
    ready_seconds: float = READY_SECONDS,
    watcher: Watcher = lambda _: None,
) -> Fleet:
    """Start a fleet in the background, unless it runs, and return when every service is ready.

    Args:
        state: where it keeps everything; made if absent.
        wishes: what shall differ from the last start; must be empty for a fleet that runs.
        ready_seconds: how long it may take.
        watcher: called with the readiness of each service whenever it was looked at.

    Raises:
        FleetError: it runs with another configuration, cannot start, or is not ready in time.
    """
    running = lock.holder(state.lock_file) is not None
    config = _running_config(state, wishes) if running else prepare(state, wishes)
    daemon = None if running else _spawn_daemon(state)
    try:
        api_key = _api_key(config, state)
        _wait_until_ready(config, state, daemon, ready_seconds, watcher)
    except FleetError:
        # What this call started and could not make ready, it takes back.
        if daemon is not None:
            down(state)
        raise
    supervisor_pid = lock.holder(state.lock_file)
    if supervisor_pid is None:
        raise FleetError(f"the fleet ended while it was starting; see {state.log_file('fleet')}")
    return Fleet(state, config, supervisor_pid, api_key, was_running=running)


def prepare_foreground(state: StateFolder, wishes: Wishes) -> Fleet:
    """Do what comes before the supervisor, for a caller that then becomes it by `supervisor_command`.

    Raises:
        FleetError: a fleet runs already, or cannot be prepared.
    """
    if lock.holder(state.lock_file) is not None:
        raise FleetError(f"a fleet already runs on {state.root}")
    config = prepare(state, wishes)
    return Fleet(state, config, os.getpid(), _api_key(config, state), was_running=False)


def supervisor_command(state: StateFolder) -> list[str]:
    """Return the command line of the supervisor's process."""
    return [sys.executable, "-m", "lorafleet.fleet", "--state", str(state.root)]


def prepare(state: StateFolder, wishes: Wishes) -> FleetConfig:
    """Make the state folder ready for a supervisor and return what it will run with.

    Raises:
        FleetError: libraries are missing, the base is no model folder, or the public port is in use.
    """
    _check_libraries()
    state.create()
    last = FleetStatus.load(state)
    if last is not None:
        end_leftovers(last)
        state.status_file.unlink()
    config = settle(FleetConfig.load(state), wishes)
    config.save(state)
    return config


def _check_libraries() -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise FleetError(
            f"a fleet trains and serves with {', '.join(missing)}, which this installation lacks; install "
            "torch, and then lorafleet[trainer] in place of lorafleet"
        )


def down(state: StateFolder, *, stop_seconds: float = STOP_SECONDS) -> bool:
    """Stop the fleet and wait for its end; return whether there was one.

    Raises:
        FleetError: it has not stopped in time.
    """
    pid = lock.holder(state.lock_file)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + stop_seconds
    while lock.holder(state.lock_file) is not None:
        if time.monotonic() > deadline:
            raise FleetError(f"the fleet (process {pid}) has not stopped within {stop_seconds:g} seconds")
        time.sleep(_POLL_SECONDS)
    return True


def readiness(config: FleetConfig) -> dict[str, bool]:
    """Return for each service whether it says that it is ready."""
    targets = {name: f"{ports.HOST}:{getattr(config.ports, name)}" for name in SERVICES}
    targets["gateway"] = f"{config.url}/readyz"
    return {name: is_ready(target) for name, target in targets.items()}


def _running_config(state: StateFolder, wishes: Wishes) -> FleetConfig:
    config = FleetConfig.load(state)
    if config is None:
        raise FleetError(f"a fleet runs on {state.root}, but {state.config_file} is missing")
    wanted = {
        "base_path": wishes.base_path.resolve() if wishes.base_path else None,
        "base_name": wishes.base_name,
        "quantization": wishes.quantization,
        "compute_dtype": wishes.compute_dtype,
    }
    differs = [name for name, value in wanted.items() if value not in {None, getattr(config, name)}]
    if wishes.port not in {None, config.ports.gateway}:
        differs.append("port")
    if differs:
        raise FleetError(
            f"the fleet already runs with another {', '.join(differs)}; stop it first with `lorafleet down`"
        )
    return config


def _spawn_daemon(state: StateFolder) -> subprocess.Popen[bytes]:
    with state.log_file("fleet").open("ab") as log:
        return subprocess.Popen(
            supervisor_command(state),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _api_key(config: FleetConfig, state: StateFolder) -> str:
    """Return the key that the command line uses; the first time, have the gateway make it."""
    key = state.read_secret(API_KEY_SECRET)
    if key is not None:
        return key
    made = subprocess.run(
        [sys.executable, "-m", "services.gateway", "create-key", "--tenant", TENANT],
        env=environment("gateway", config, state),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_KEY_SECONDS,
        check=False,
    )
    found = _KEY.search(made.stdout)
    if made.returncode != 0 or found is None:
        raise FleetError(f"the first API key could not be made: {made.stderr.strip()[-1000:]}")
    state.write_secret(API_KEY_SECRET, found[0])
    return found[0]


def _wait_until_ready(
    config: FleetConfig,
    state: StateFolder,
    daemon: subprocess.Popen[bytes] | None,
    ready_seconds: float,
    watcher: Watcher,
) -> None:
    deadline = time.monotonic() + ready_seconds
    while True:
        ready = readiness(config)
        watcher(ready)
        if all(ready.values()):
            return
        if daemon is not None and daemon.poll() is not None:
            raise FleetError(f"the supervisor ended:\n{tail(state.log_file('fleet'))}")
        _raise_if_hopeless(state, ready)
        if time.monotonic() > deadline:
            waiting = [name for name, is_there in ready.items() if not is_there]
            last_words = "\n".join(f"{name}: {tail(state.log_file(name), lines=1)}" for name in waiting)
            raise FleetError(
                f"not ready within {ready_seconds:g} seconds: {', '.join(waiting)}; the ends of their logs:\n"
                f"{last_words}"
            )
        time.sleep(_POLL_SECONDS)


def _raise_if_hopeless(state: StateFolder, ready: Readiness) -> None:
    status = FleetStatus.load(state)
    for process in status.processes if status else ():
        keeps_dying = process.restarts >= _HOPELESS_RESTARTS and not ready.get(process.name, False)
        if process.state == "failed" or keeps_dying:
            log = tail(state.log_file(process.name))
            raise FleetError(f"{process.name} does not start ({process.last_ending}):\n{log}")
