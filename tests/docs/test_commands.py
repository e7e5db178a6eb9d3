"""Every command and program in the README and the guides runs, in order, on a fleet of its own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lorafleet.fleet import launch, ports
from lorafleet.fleet.config import BUNDLED_BASE_NAME, FleetConfig, Ports, bundled_base
from lorafleet.fleet.launch import API_KEY_SECRET
from lorafleet.fleet.state import StateFolder
from tests.support.documents import ROOT, Block, blocks
from tests.support.models import make_tiny_llama

# Each goes on from what those before it left.
BEGINNINGS = ("docs/quickstart.md", "README.md")
GUIDES = ("docs/fine-tuning.md", "docs/serving.md", "docs/operations.md")
# Commands that install, build or start containers, and what runs them instead.
RUN_ELSEWHERE = {
    "make setup": ".ci/run",
    ". .venv/bin/activate": ".ci/run",
    "make demo": "lorafleet/demo/demo.py",
    "make test": ".ci/run",
    "python3 -m venv lorafleet-env": "tests/packaging/test_wheel.py",
    ". lorafleet-env/bin/activate": "tests/packaging/test_wheel.py",
    "pip install torch==2.13.0": "tests/packaging/test_wheel.py",
    'pip install "dist/lorafleet-0.1.0-py3-none-any.whl[trainer]"': "tests/packaging/test_wheel.py",
    "cp .env.example .env": "tests/deploy/compose_up.sh",
    "docker compose up": "tests/deploy/compose_up.sh",
}
URL, KEY = "http://127.0.0.1:8000/v1", "lf-..."


def take_ports(state: StateFolder) -> None:
    """Have a fleet that is not there yet use free ports, far from those that every fleet begins at."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server((ports.HOST, 0))) for _ in Ports.model_fields]
        numbers = [found.getsockname()[1] for found in sockets]
    state.create()
    FleetConfig(
        base_name=BUNDLED_BASE_NAME,
        base_path=bundled_base(),
        ports=Ports(**dict(zip(Ports.model_fields, numbers, strict=True))),
    ).save(state)


class Reader:
    """Somebody who types what the documents say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.state = StateFolder(folder / "state")
        self.base = make_tiny_llama(folder / "a-base")
        for state in (self.state, StateFolder(self.folder / "own-fleet")):
            take_ports(state)
        programs = str(Path(sys.executable).parent)
        self._environment = os.environ | {
            "LORAFLEET_STATE": str(self.state.root),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def read(self, block: Block) -> str:
        """Do what a block says and return what was printed."""
        if block.language == "sh":
            script = "\n".join(command for command in block.commands if command not in RUN_ELSEWHERE)
            return self._run(["bash", "-euo", "pipefail", "-c", self._here(script)], block)
        return self._run([sys.executable, "-c", self._here(block.text)], block)

    def _here(self, text: str) -> str:
        """Return a text with the coordinates of this fleet in place of the documents'."""
        config, key = FleetConfig.load(self.state), self.state.read_secret(API_KEY_SECRET)
        if config is not None and key is not None:
            text = text.replace(URL, f"{config.url}/v1").replace(KEY, key)
        return text.replace("/path/to/the/model", str(self.base))

    def _run(self, command: list[str], block: Block) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{block.document}:\n{command[-1]}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def read_all(self, documents: Sequence[str]) -> dict[str, str]:
        """Do what documents say, each with a fleet that runs, and return what the blocks printed."""
        printed = {}
        for document in documents:
            if document != BEGINNINGS[0]:
                self._run(["lorafleet", "up", "--timeout", "600"], Block(document, "sh", ""))
            for block in blocks(document):
                if block.language in {"sh", "python"}:
                    printed[block.text] = self.read(block)
        self._run(["lorafleet", "up", "--timeout", "600"], Block("", "sh", ""))
        jobs = json.loads(self._run(["lorafleet", "jobs", "--json"], Block("", "sh", "")))["data"]
        assert jobs
        assert {job["status"] for job in jobs} == {"succeeded"}
        return printed


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    try:
        yield reader
    finally:
        for state in (reader.state, StateFolder(reader.folder / "own-fleet")):
            launch.down(state)


def test_what_runs_elsewhere_is_still_there() -> None:
    said = {command for document in BEGINNINGS for block in blocks(document) for command in block.commands}
    for command, where in RUN_ELSEWHERE.items():
        assert command in said, f"no document says {command!r} any more"
        assert (ROOT / where).exists()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_quickstart_and_readme_run(reader: Reader) -> None:
    printed = reader.read_all(BEGINNINGS)
    answer = next(text for said, text in printed.items() if 'run tickets "My umbrella' in said)
    assert answer.splitlines()[0] == "billing"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_guides_run(reader: Reader) -> None:
    data = next(block for block in blocks(BEGINNINGS[0]) if block.language == "python")
    reader.read(data)
    printed = reader.read_all(GUIDES)
    assert "parity_max_difference" in next(text for said, text in printed.items() if "show tickets" in said)
    verified = next(text for said, text in printed.items() if "services.registry verify" in said)
    assert json.loads(verified)["damages"] == []
    restored = next(text for said, text in printed.items() if "cp -a backup/store" in said)
    assert "tickets" in restored
