"""The Triton kernels compile for GPUs, which takes none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.triton_mode import in_the_interpreter

pytestmark = in_the_interpreter

ROOT = Path(__file__).parents[3]
# What every GPU since the A100's generation gives to one program.
SHARED_LIMIT_BYTES = 99 * 1024
READS_WEIGHTS_OR_PAGES = {"_attend_part", "_shrink", "_expand"}


def test_every_kernel_compiles_to_machine_code_that_reads_widely(tmp_path: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_compiled"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {(item["capability"], item["dtype"]) for item in found} == {
        (80, "bf16"),
        (90, "bf16"),
        (90, "fp32"),
    }
    for item in found:
        assert item["cubin_bytes"] > 0
        assert item["shared_bytes"] <= SHARED_LIMIT_BYTES, item
        if item["kernel"] in READS_WEIGHTS_OR_PAGES:
            assert item["wide_loads"] > 0, item
