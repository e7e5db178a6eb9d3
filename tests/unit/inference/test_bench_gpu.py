"""The scripts that measure on a GPU run, in small on a CPU, and end with the JSON that they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[3]


def run(module: str, *options: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{module}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_decode_measures_every_case_and_peft() -> None:
    sizes = ["--rows", "1", "3", "--adapters", "0", "1", "3", "--peft-adapters", "0", "3"]
    small = ["--device", "cpu", "--shape", "tiny", "--rank", "4", "--prompt-tokens", "8", "--steps", "4"]
    result = run("gpu_decode", *small, *sizes, "--decode-graphs", "eager")
    cases = [(case["rows"], case["adapters"]) for case in result["engine"]]
    assert cases == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 3)]
    assert result["captured_steps"] == 6
    for case in result["engine"]:
        assert (
            0 < case["share_of_floor"] == pytest.approx(case["floor_ms"] / case["step_ms"], rel=0.2, abs=2e-3)
        )
    floors = {(case["rows"], case["adapters"]): case["floor_ms"] for case in result["engine"]}
    assert floors[1, 0] < floors[1, 1]
    assert floors[3, 0] < floors[3, 1] < floors[3, 3]
    assert [(case["rows"], case["adapters"]) for case in result["peft"]] == [(1, 0), (3, 0), (3, 3)]


def test_training_measures_one_job_and_four_together() -> None:
    small = ["--device", "cpu", "--shape", "tiny", "--rank", "4", "--batch", "2", "--row-tokens", "16"]
    result = run("gpu_training", *small, "--steps", "2", "--gradient-checkpointing")
    assert result["alone"]["step_tokens"] == 32
    assert result["together"]["jobs"] == 4
    assert result["together"]["step_tokens"] == 64
    for part in ("alone", "together"):
        assert result[part]["tokens_per_second"] > 0
        assert result[part]["share_of_product_rate"] > 0
        assert result[part]["peak_bytes"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
@pytest.mark.parametrize("module", ["gpu_decode", "gpu_training"])
def test_without_a_gpu_nothing_is_measured(module: str) -> None:
    assert run(module)["skipped"] == "there is no CUDA device"
