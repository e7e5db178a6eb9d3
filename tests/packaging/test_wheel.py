"""The wheel, installed in an empty environment, runs a fleet far from the repository."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.documents import ROOT

BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "ATTRIBUTION.md")


def run(*command: str | Path, cwd: Path, state: Path | None = None) -> str:
    """Run a command without a trace of the repository in its environment."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}
    }
    environment = inherited | ({"LORAFLEET_STATE": str(state)} if state else {})
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, built from the source distribution, and the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_distributions_are_whole(built: Path) -> None:
    [wheel], [source] = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    for name in BASE_FILES:
        assert f"assets/base/{name}" in names
    assert "assets/demo_tasks.py" in names
    assert "lorafleet/py.typed" in names
    kernels = {path.name for path in (ROOT / "services/inference/kernels").glob("*.[ch]")}
    assert kernels == {name.rpartition("/")[2] for name in names if name.endswith((".c", ".h"))}
    assert not [name for name in names if name.startswith(("tests/", "docs/", "bench/"))]
    with tarfile.open(source) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "requirements/full.txt",
        "protos/build.py",
        "docs/quickstart.md",
    } <= sources
    assert max(wheel.stat().st_size, source.stat().st_size) < 30e6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_fleet_runs_from_the_wheel(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "environment", with_pip=True)
    programs = tmp_path / "environment" / "bin"
    [wheel] = built.glob("*.whl")
    run(programs / "pip", "install", "--quiet", "torch==2.13.0", cwd=tmp_path)
    run(programs / "pip", "install", "--quiet", f"{wheel}[trainer]", cwd=tmp_path)
    run(programs / "pip", "check", cwd=tmp_path)

    def lorafleet(*arguments: str) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(
            run(programs / "lorafleet", *arguments, "--json", cwd=tmp_path, state=tmp_path / "state")
        )
        return said

    started = lorafleet("up", "--timeout", "600")
    try:
        answer = lorafleet("run", started["base"], "Once upon a time", "--exact", "--max-tokens", "16")
        assert answer["text"].strip()
        (tmp_path / "rows.jsonl").write_text(
            "".join(json.dumps({"prompt": f"{n} apples\n", "completion": "fruit"}) + "\n" for n in range(20))
        )
        lorafleet("train", "rows.jsonl", "--name", "apples", "--epochs", "8", "--learning-rate", "4e-3")
        assert lorafleet("run", "apples", "33 apples")["text"].strip() == "fruit"
    finally:
        lorafleet("down")
    tasks = "from pathlib import Path; from lorafleet.tasks import generated_tasks as g; "
    tasks += "print(len(g(Path('tasks'), max_train_rows=9, test_rows=9)))"
    assert int(run(programs / "python", "-c", tasks, cwd=tmp_path)) >= 3
