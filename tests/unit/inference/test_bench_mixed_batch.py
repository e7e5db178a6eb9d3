"""The mixed-batch script runs, and its last line is the JSON that it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.models import make_tiny_llama

ROOT = Path(__file__).parents[3]
WAYS = ("base_only", "one_adapter", "adapter_per_row", "peft_adapter_per_row")


def test_the_last_line_is_json_with_every_way(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    sizes = ["--rows", "3", "--rank", "4", "--prompt-tokens", "8", "--tokens", "4", "--rounds", "1"]
    command = [sys.executable, "-m", "bench.mixed_batch", "--base", str(base), "--threads", "1", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["bench"], result["rows"], result["quantization"]) == ("mixed_batch", 3, "nf4")
    for way in WAYS:
        assert result[way]["prefill_tokens_per_second"] > 0
        assert result[way]["decode_tokens_per_second"] > 0
