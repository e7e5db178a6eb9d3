"""One of our services as a process of its own, as an operator would start it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
START_SECONDS = 60.0


@contextmanager
def service_process(name: str, folder: Path, settings: Mapping[str, object]) -> Iterator[str]:
    """Run `python -m services.NAME` until the end; yield its address, as soon as it listens.

    Args:
        folder: for its log, `NAME.log`.
        settings: by their names without the service's prefix; LISTEN is a free port.
    """
    port_file = folder / f"{name}.port"
    port_file.unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORAFLEET_")}
    values = {"LISTEN": "127.0.0.1:0", **settings}
    environment |= {f"LORAFLEET_{name.upper()}_{key}": str(value) for key, value in values.items()}
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{name}"],
            cwd=ROOT,
            env=environment | {"LORAFLEET_PORT_FILE": str(port_file)},
            stderr=log,
        )
        try:
            yield _address(process, port_file)
        finally:
            process.terminate()
            process.wait(timeout=START_SECONDS)


def _address(process: subprocess.Popen[bytes], port_file: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while not port_file.exists():
        assert process.poll() is None, f"the process ended; see {port_file.with_suffix('.log')}"
        assert time.monotonic() < deadline, "the process does not listen"
        time.sleep(0.02)
    return port_file.read_text("ascii").strip()
