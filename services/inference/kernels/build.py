"""Compiling the kernels: once per source, compiler and processor, into the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = ("lanes.h", "linear.h", "attention.h", "linear.c", "attention.c", "decoder.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-fopenmp")

_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 120
_HERE = Path(__file__).parent


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def build_library(cache_path: Path | None = None) -> Path:
    """Return the shared library of the kernels, compiled now unless an earlier process has done it.

    The file's name is a digest of all that it depends on, so a library never meets a source, a compiler or a
    processor other than its own.

    Args:
        cache_path: where libraries are kept; by default `lorafleet/kernels` in the user's cache folder.

    Raises:
        BuildError: there is no compiler, it fails, or the folder cannot be written or is not ours alone.
    """
    compiler = _find_compiler()
    try:
        folder = _private_folder(cache_path or _user_cache_path())
        library = folder / f"kernels-{_digest(compiler)}.so"
        if not library.exists():
            _compile(compiler, library)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{type(error).__name__}: {error}") from error
    return library


def _find_compiler() -> str:
    """The compiler that CC names, or else the first that is installed."""
    named = os.environ.get("CC")
    for name in (named,) if named else _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise BuildError(f"no C compiler ({named or ', '.join(_COMPILERS)}) is installed")


def _user_cache_path() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lorafleet" / "kernels"


def _private_folder(path: Path) -> Path:
    """Make the folder; code is loaded from it, so nobody else may write there."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(f"{path} can be written by other users")
    return path


def _digest(compiler: str) -> str:
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_SECONDS
    )
    digest = hashlib.sha256()
    parts = [version.stdout, _processor().encode(), " ".join(FLAGS).encode()]
    for part in [*parts, *((_HERE / name).read_bytes() for name in SOURCES)]:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What `-march=native` depends on: the machine and, where the system tells them, its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model", "model name", "CPU part")
    told = sorted({line for line in lines if line.partition(":")[0].strip() in wanted})
    return "\n".join([platform.machine(), platform.processor(), *told])


def _compile(compiler: str, library: Path) -> None:
    """Compile beside the library's place and move the result there, so that nobody sees half of it."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        sources = [str(_HERE / name) for name in SOURCES if name.endswith(".c")]
        done = subprocess.run(
            [compiler, *FLAGS, "-o", str(made), *sources],
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMPILE_SECONDS,
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            raise BuildError(f"{compiler} failed: {lines[0] if lines else f'status {done.returncode}'}")
        made.rename(library)
