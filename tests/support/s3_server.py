"""A real S3 server for tests: the one named in the environment, else MinIO, else OpenStack Swift, else none.

`LORAFLEET_TEST_S3_ENDPOINT` (with `..._ACCESS_KEY` and `..._SECRET_KEY`) names a running server.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SWIFT_LAUNCHER = REPOSITORY.parent / "shared" / "tools" / "s3" / "swift_s3.py"
SWIFT_VENV = REPOSITORY / ".cache" / "swift-venv"
SWIFT_REQUIREMENT = "swift==2.38.3"
START_SECONDS = 30.0
INSTALL_SECONDS = 300.0
ACCESS_KEY = "minioadmin"
SECRET_KEY = "minioadmin"


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where a server listens, and who may use it. `endpoint` is `http(s)://host:port`."""

    endpoint: str
    access_key: str
    secret_key: str

    def store_url(self, bucket: str) -> str:
        """The store URL of `bucket` on this server."""
        return f"s3://{bucket}?endpoint={self.endpoint}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server; skips the test where none can be had."""
    endpoint = os.environ.get("LORAFLEET_TEST_S3_ENDPOINT")
    folder = tmp_path_factory.mktemp("s3")
    if endpoint:
        access_key = os.environ["LORAFLEET_TEST_S3_ACCESS_KEY"]
        yield S3Server(endpoint, access_key, os.environ["LORAFLEET_TEST_S3_SECRET_KEY"])
    elif binary := shutil.which("minio"):
        with _minio(binary, folder) as server:
            yield server
    elif SWIFT_LAUNCHER.is_file():
        with _swift(folder) as server:
            yield server
    else:
        pytest.skip("no S3 server: set LORAFLEET_TEST_S3_ENDPOINT or put minio on the PATH")


@contextlib.contextmanager
def _minio(binary: str, folder: Path) -> Iterator[S3Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    command = [binary, "server", str(folder), "--address", f"127.0.0.1:{port}"]
    with (folder / "minio.log").open("wb") as log, _child(command, environment, log.fileno()) as process:
        endpoint = f"http://127.0.0.1:{port}"
        _wait_for_health(endpoint, process)
        yield S3Server(endpoint, ACCESS_KEY, SECRET_KEY)


@contextlib.contextmanager
def _swift(folder: Path) -> Iterator[S3Server]:
    python = SWIFT_VENV / "bin" / "python"
    if not (SWIFT_VENV / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", SWIFT_VENV], check=True, timeout=INSTALL_SECONDS)
        install = [str(python), "-m", "pip", "install", "--quiet", SWIFT_REQUIREMENT]
        if subprocess.run(install, timeout=INSTALL_SECONDS).returncode != 0:
            pytest.skip("no S3 server: OpenStack Swift could not be installed")
        (SWIFT_VENV / "ready").touch()
    command = [str(python), str(SWIFT_LAUNCHER), "--data", str(folder), "--port", "0"]
    with (folder / "swift.log").open("wb") as log, _child(command, dict(os.environ), log.fileno()) as process:
        yield S3Server(_announced_endpoint(process), ACCESS_KEY, SECRET_KEY)


@contextlib.contextmanager
def _child(command: list[str], environment: dict[str, str], log: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _announced_endpoint(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
    line = process.stdout.readline().decode() if readable else ""
    if not line.startswith("READY "):
        raise RuntimeError(f"the S3 server did not start: {line!r}")
    return line.removeprefix("READY ").strip()


def _wait_for_health(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{endpoint}/minio/health/live", timeout=1):  # noqa: S310
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError("the S3 server did not start")
