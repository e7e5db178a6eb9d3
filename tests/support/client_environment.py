"""Python environments of foreign clients, whose requirements clash with ours; made when first asked for."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "clients" / "foreign"
_ENVIRONMENTS = ROOT / ".cache" / "clients"
INSTALL_SECONDS = 1200.0
RUN_SECONDS = 300.0


def client_python(name: str) -> Path:
    """Return the interpreter of the environment that `NAME.requirements.txt` describes to the version.

    It is kept under the digest of that file; another test that makes it at the same time is waited for.
    """
    requirements = SCRIPTS / f"{name}.requirements.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = _ENVIRONMENTS / f"{name}-{digest}"
    python, mark = folder / "bin" / "python", folder / ".installed"
    _ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with (_ENVIRONMENTS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mark.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(folder)])
            _run(
                [
                    str(python),
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--no-deps",
                    "--requirement",
                    str(requirements),
                ]
            )
            mark.touch()
    return python


def run_client(name: str, place: Mapping[str, Any], *, cwd: Path, **variables: str) -> dict[str, Any]:
    """Run `NAME_client.py` in its environment and return what it printed last, which is JSON.

    Args:
        place: its one argument, as JSON.
        cwd: its working directory, and its home: what it caches stays there.
        variables: of its environment.
    """
    command = [str(client_python(name)), str(SCRIPTS / f"{name}_client.py"), json.dumps(place)]
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "TZ") if key in os.environ}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=kept | {"HOME": str(cwd)} | variables,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
