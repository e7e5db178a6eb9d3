"""State folder, secrets, lock, ports, logs and the configuration of a start."""

import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafleet.fleet import lock, ports
from lorafleet.fleet.config import FleetConfig, Wishes, settle
from lorafleet.fleet.errors import FleetError
from lorafleet.fleet.launch import prepare
from lorafleet.fleet.lock import StateLock
from lorafleet.fleet.logfile import LogPump, RotatingLog, tail
from lorafleet.fleet.services import environment
from lorafleet.fleet.state import StateFolder


@pytest.fixture
def state(tmp_path: Path) -> StateFolder:
    folder = StateFolder(tmp_path / "state")
    folder.create()
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "Tiny-Base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind((ports.HOST, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_only_the_owner_can_read_the_folder_and_its_secrets(state: StateFolder) -> None:
    state.write_secret("api_key", "lf-secret")
    assert stat.S_IMODE(state.root.stat().st_mode) == 0o700
    assert stat.S_IMODE((state.secrets / "api_key").stat().st_mode) == 0o600
    assert state.read_secret("api_key") == "lf-secret"
    assert state.read_secret("absent") is None


def test_a_secret_is_drawn_once(state: StateFolder) -> None:
    first = state.secret("key_pepper")
    assert len(first) == 64
    assert state.secret("key_pepper") == first


def test_the_lock_is_held_by_one_process_and_ends_with_it(state: StateFolder) -> None:
    script = (
        "import sys, time; from pathlib import Path; from lorafleet.fleet.lock import StateLock; "
        f"lock = StateLock.take(Path({str(state.lock_file)!r})); print('held', flush=True); time.sleep(60)"
    )
    assert lock.holder(state.lock_file) is None
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert lock.holder(state.lock_file) == other.pid
        assert StateLock.take(state.lock_file, wait_seconds=0.1) is None
        other.kill()
    assert lock.holder(state.lock_file) is None
    own = StateLock.take(state.lock_file)
    assert own is not None
    own.release()


def test_next_free_passes_over_ports_in_use(taken_port: int) -> None:
    assert not ports.is_free(taken_port)
    assert ports.next_free(taken_port) > taken_port
    free = ports.next_free(taken_port)
    assert ports.next_free(taken_port, taken=[free]) > free


def test_the_first_start_takes_free_ports_and_records_them(state: StateFolder, base: Path) -> None:
    config = prepare(state, Wishes(base_path=base))
    chosen = config.ports.model_dump()
    assert len(set(chosen.values())) == len(chosen)
    assert FleetConfig.load(state) == config
    assert (config.base_name, config.base_path) == ("tiny-base", base.resolve())


def test_later_starts_keep_what_was_recorded(state: StateFolder, base: Path) -> None:
    first = prepare(state, Wishes(base_path=base, base_name="tiny", quantization="none"))
    again = prepare(state, Wishes())
    assert again == first


def test_an_inner_port_moves_and_the_public_one_does_not(
    state: StateFolder, base: Path, taken_port: int
) -> None:
    first = prepare(state, Wishes(base_path=base))
    inner = first.model_copy(update={"ports": first.ports.model_copy(update={"registry": taken_port})})
    assert settle(inner, Wishes()).ports.registry > taken_port
    public = first.model_copy(update={"ports": first.ports.model_copy(update={"gateway": taken_port})})
    with pytest.raises(FleetError, match=f"port {taken_port} is in use.*--port"):
        settle(public, Wishes())
    with pytest.raises(FleetError, match=f"port {taken_port} is in use"):
        settle(None, Wishes(base_path=base, port=taken_port))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="no model folder"):
        settle(None, Wishes(base_path=tmp_path))


def test_a_damaged_configuration_is_told(state: StateFolder) -> None:
    state.config_file.write_text('{"base_name": 1}')
    with pytest.raises(FleetError, match=r"fleet\.json cannot be read"):
        FleetConfig.load(state)


def test_services_see_their_own_settings_only(
    state: StateFolder, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFLEET_GATEWAY_LOG_LEVEL", "NONSENSE")
    monkeypatch.setenv("LORAFLEET_STATE", "/elsewhere")
    config = prepare(state, Wishes(base_path=base, base_name="tiny"))
    gateway = environment("gateway", config, state)
    ours = {name for name in gateway if name.startswith("LORAFLEET_")}
    assert all(name.startswith("LORAFLEET_GATEWAY_") for name in ours)
    assert "LORAFLEET_GATEWAY_LOG_LEVEL" not in ours
    assert gateway["LORAFLEET_GATEWAY_KEY_PEPPER"] == state.secret("key_pepper")
    trainer = environment("trainer", config, state)
    assert "LORAFLEET_TRAINER_KEY_PEPPER" not in trainer
    assert f'{{"tiny": "{base.resolve()}"}}' == trainer["LORAFLEET_TRAINER_BASES"]


def test_logs_rotate_by_size_and_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "one.log"
    log = RotatingLog(path, max_bytes=100, kept_files=2)
    for number in range(12):
        log.write(f"line {number:02d} {'x' * 20}\n".encode())
    files = [tmp_path / "one.log.2", tmp_path / "one.log.1", path]
    assert all(file.stat().st_size <= 100 for file in files)
    assert not (tmp_path / "one.log.3").exists()
    kept = "".join(file.read_text() for file in files)
    assert [line.split()[1] for line in kept.splitlines()] == [f"{number:02d}" for number in range(3, 12)]


def test_an_existing_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "one.log"
    path.write_bytes(b"x" * 90)
    log = RotatingLog(path, max_bytes=100)
    log.write(b"y" * 20)
    assert path.read_bytes() == b"y" * 20
    assert (tmp_path / "one.log.1").read_bytes() == b"x" * 90


def test_the_pump_writes_what_children_said_before_they_ended(tmp_path: Path) -> None:
    pump = LogPump()
    path = tmp_path / "talker.log"
    output = pump.attach(RotatingLog(path))
    with open(output, "wb") as stream:
        subprocess.run([sys.executable, "-c", "print('x' * 50_000)"], stdout=stream, check=True, timeout=30)
    pump.close()
    assert path.stat().st_size == 50_001
    assert tail(path, lines=1) == "x" * 4095
    assert tail(tmp_path / "absent.log") == ""
