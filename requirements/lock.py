"""Writes the locks: every library that the pins of pyproject.toml bring, with the hashes of its files.

    python requirements/lock.py

It needs pip-tools, and the network. `torch` is left out, with what only its GPU builds need: which build is
right is for whoever installs to say. So are packaging tools.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
PYPROJECT = FOLDER.parent / "pyproject.toml"
# The extras that each lock covers.
LOCKS = {"light": (), "full": ("all",)}
NOT_LOCKED = re.compile(r"(torch|triton|setuptools|lorafleet|nvidia-.*|cuda-.*)(==| @)")
_OWN = re.compile(r"lorafleet\[(.*)\]")
_OPTIONS = (
    "--generate-hashes",
    "--no-annotate",
    "--no-emit-find-links",
    "--no-emit-index-url",
    "--no-emit-trusted-host",
    "--no-header",
    "--quiet",
    "--strip-extras",
)


def direct_pins(extras: tuple[str, ...]) -> list[str]:
    """Return the pins of pyproject.toml for an installation with `extras`, those of extras in extras too."""
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    pins = list(project["dependencies"]) if not extras else direct_pins(())
    for extra in extras:
        for pin in project["optional-dependencies"][extra]:
            own = _OWN.fullmatch(pin)
            pins += direct_pins(tuple(own[1].split(","))) if own else [pin]
    return list(dict.fromkeys(pins))


def locked(pins: list[str]) -> str:
    """Return the lock of `pins`: one entry for each library, with its hashes."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, found = Path(folder) / "wanted.in", Path(folder) / "found.txt"
        wanted.write_text("\n".join(pins) + "\n", "utf-8")
        command = [
            sys.executable,
            "-m",
            "piptools",
            "compile",
            *_OPTIONS,
            "--output-file",
            str(found),
            str(wanted),
        ]
        subprocess.run(command, check=True)
        text = found.read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    entries = re.split(r"\n(?=\S)", "\n".join(lines))
    return "\n".join(entry for entry in entries if not NOT_LOCKED.match(entry)) + "\n"


def main() -> None:
    """Write both locks."""
    for name, extras in LOCKS.items():
        (FOLDER / f"{name}.txt").write_text(locked(direct_pins(extras)), "utf-8")


if __name__ == "__main__":
    main()
