"""The bench that kills a fleet under load, in its short form on a tiny base: nothing listed may be lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import make_tiny_llama

BENCH = Path(__file__).parents[2] / "bench" / "kills_under_load.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_lost_when_processes_are_killed_under_load(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    arguments = ["--base", str(base), "--base-name", "tiny", "--streams", "4", "--seconds", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCH), *arguments, "--killed-job-epochs", "50"],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["is_intact"] is True
    steps = {step["name"]: step for step in result["steps"]}
    assert list(steps) == [
        "kill-valkey", "kill-registry", "kill-inference", "kill-trainer", "kill-gateway", "flushall",
        "kill-everything",
    ]  # fmt: skip
    # Models that all answer alike would show nothing.
    assert result["different_models"] >= 3
    assert all(step["ok"] > 0 and step["first_success_seconds"] is not None for step in steps.values())
    # A fleet serves on without its trainer, and the gateway's door stays open while it is started again: what
    # was cut off comes again, by the stock client's own attempts.
    assert steps["kill-trainer"]["failed"] == {}
    assert steps["kill-gateway"]["failed_whole"] == {}
    job = result["killed_job"]
    assert (job["status"], job["versions"]) == ("succeeded", 1)
    assert job["attempts"] >= 2
    # It went on from a checkpoint, and did not begin again.
    assert all(0 < step < job["total_steps"] for step in job["taken_up_again_at_steps"])
    assert job["taken_up_again_at_steps"]
