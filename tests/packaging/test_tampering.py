"""Row 144: a package that is not the one that was locked is not installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def wheel(folder: Path, version: str, code: str) -> Path:
    path = folder / f"locked-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("locked.py", code)
        info = f"locked-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: locked\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def install(packages: Path, lock: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Install as CONTRIBUTING tells, from `packages` alone."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--find-links", str(packages), "--target", str(target)]
    command += ["--no-deps", "--require-hashes", "-r", str(lock)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("fault", ["none", "tampered", "newer from elsewhere", "not locked"])
def test_row_144_only_what_was_locked_is_installed(tmp_path: Path, fault: str) -> None:
    packages, target, lock = tmp_path / "packages", tmp_path / "target", tmp_path / "lock.txt"
    packages.mkdir()
    locked = wheel(packages, "1.0", "ORIGIN = 'ours'\n")
    digest = hashlib.sha256(locked.read_bytes()).hexdigest()
    lock.write_text(f"locked==1.0 --hash=sha256:{digest}\n")
    if fault == "tampered":
        wheel(packages, "1.0", "ORIGIN = 'theirs'\n")
    elif fault == "newer from elsewhere":
        wheel(packages, "99.0", "ORIGIN = 'theirs'\n")
    elif fault == "not locked":
        lock.write_text("locked\n")
    done = install(packages, lock, target)
    if fault in ("none", "newer from elsewhere"):
        assert done.returncode == 0, done.stderr
        assert (target / "locked.py").read_text() == "ORIGIN = 'ours'\n"
    else:
        assert done.returncode != 0
        assert "hash" in done.stderr.lower()
        assert not (target / "locked.py").exists()
