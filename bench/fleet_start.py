"""How long `lorafleet up` takes until every service is ready, and which part takes it.

Each run starts a fleet in an empty state folder through the command line and stops it. One more run is
watched from within: when the supervisor had started its processes, when the first API key was there, when
each service said that it was ready, and when the base gave its first answer. Last come the imports of each
process alone, with nothing else running. The last line is JSON.

    python -m bench.fleet_start --base assets/base
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI

from lorafleet.fleet import launch
from lorafleet.fleet.config import Wishes
from lorafleet.fleet.state import StateFolder
from lorafleet.fleet.status import FleetStatus

TARGET_SECONDS = 20.0
IMPORTS = {
    "command line": "lorafleet.cli",
    "supervisor": "lorafleet.fleet.__main__",
    "registry": "services.registry.program",
    "inference": "services.inference.service",
    "trainer": "services.trainer.service",
    "gateway": "services.gateway.__main__",
}


def main() -> None:
    """Run everything and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, help="model folder; the bundled one without it")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    totals = [from_command_line(options.base) for _ in range(options.runs)]
    print("up: " + ", ".join(f"{total:.1f} s" for total in totals), flush=True)
    parts = from_within(options.base)
    for name, seconds in parts.items():
        print(f"{name:28} {seconds:6.2f} s", flush=True)
    imports = {name: import_seconds(module) for name, module in IMPORTS.items()}
    for name, seconds in imports.items():
        print(f"imports of the {name:13} {seconds:6.2f} s", flush=True)
    median = statistics.median(totals)
    result = {
        "bench": "fleet_start",
        "base": options.base.name if options.base else "bundled",
        "up_seconds": [round(total, 2) for total in totals],
        "median_up_seconds": round(median, 2),
        "target_seconds": TARGET_SECONDS,
        "within_target": median <= TARGET_SECONDS,
        "parts_seconds": rounded(parts),
        "import_seconds": rounded(imports),
    }
    print(json.dumps(result))


def from_command_line(base: Path | None) -> float:
    """Return the seconds from the command to its end, which is when all are ready."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-start-") as state:
        wishes = ["--base", str(base)] if base else []
        began_at = time.monotonic()
        try:
            lorafleet("up", "--state", state, *wishes)
            return time.monotonic() - began_at
        finally:
            lorafleet("down", "--state", state)


def from_within(base: Path | None) -> dict[str, float]:
    """Return the seconds from the call of `up` to each thing that happens after it."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-start-") as folder:
        state = StateFolder(Path(folder) / "state")
        began_at = time.monotonic()
        seen: dict[str, float] = {}

        def watch(ready: launch.Readiness) -> None:
            now = time.monotonic() - began_at
            # The first look comes after the key was made.
            seen.setdefault("first API key", now)
            if all_started(state):
                seen.setdefault("processes started", now)
            for name, is_ready in ready.items():
                if is_ready:
                    seen.setdefault(f"{name} ready", now)

        try:
            fleet = launch.up(state, Wishes(base_path=base), watcher=watch)
            seen["everything ready"] = time.monotonic() - began_at
            client = OpenAI(base_url=fleet.base_url, api_key=fleet.api_key)
            client.completions.create(model=fleet.config.base_name, prompt="Once", max_tokens=1)
            seen["first answer"] = time.monotonic() - began_at
        finally:
            launch.down(state)
    return dict(sorted(seen.items(), key=lambda part: part[1]))


def all_started(state: StateFolder) -> bool:
    """Return whether the supervisor has started every process."""
    status = FleetStatus.load(state)
    return status is not None and all(process.pid for process in status.processes)


def import_seconds(module: str) -> float:
    """Return the seconds that a process of its own needs to start and import `module`."""
    began_at = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.monotonic() - began_at


def lorafleet(*arguments: str) -> None:
    """Run the command line."""
    command = [sys.executable, "-c", "from lorafleet.cli import main; main()", *arguments, "--json"]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds, 2) for name, seconds in figures.items()}


if __name__ == "__main__":
    main()
