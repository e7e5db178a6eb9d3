"""Every command and program in the README and the guides runs, in order, on a fleet of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafleet.fleet import launch
from lorafleet.fleet.config import FleetConfig
from lorafleet.fleet.launch import API_KEY_SECRET
from lorafleet.fleet.state import StateFolder
from tests.support.documents import ROOT, Block, blocks
from tests.support.models import make_tiny_llama

# Each goes on from what those before it left.
DOCUMENTS = (
    "docs/quickstart.md",
    "README.md",
    "docs/fine-tuning.md",
    "docs/serving.md",
    "docs/operations.md",
)
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


class Reader:
    """Somebody who types what the documents say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.state = StateFolder(folder / "state")
        self.base = make_tiny_llama(folder / "a-base")
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

    def up(self) -> None:
        """Start the fleet where a document left it stopped."""
        self._run(["lorafleet", "up"], Block("", "sh", ""))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    try:
        yield reader
    finally:
        for state in (reader.state, StateFolder(reader.folder / "own-fleet")):
            launch.down(state)


def test_what_runs_elsewhere_is_still_there() -> None:
    said = {command for document in DOCUMENTS for block in blocks(document) for command in block.commands}
    for command, where in RUN_ELSEWHERE.items():
        assert command in said, f"no document says {command!r} any more"
        assert (ROOT / where).exists()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_command_and_program_runs(reader: Reader) -> None:
    printed = {}
    for document in DOCUMENTS:
        if document != DOCUMENTS[0]:
            reader.up()
        for block in blocks(document):
            if block.language in {"sh", "python"}:
                printed[document, block.text] = reader.read(block)
    answer = next(text for (_, said), text in printed.items() if 'lorafleet run tickets "My umbrella' in said)
    assert answer.splitlines()[0] == "billing"
    verified = next(text for (_, said), text in printed.items() if "services.registry verify" in said)
    assert json.loads(verified)["damages"] == []
