"""What checking an adapter costs: every value of a large file scanned, beside a plain SHA-256 of that file.

For each dtype one file is written, then checked and hashed in turns, so that a busy machine disturbs both
alike; the best of the rounds counts, in processor time of one core. "check" is the reader alone, as the
registry runs it on an upload that it hashed while receiving; "read" has the hash with it. The last line is
JSON.

    python -m bench.adapter_check --megabytes 100
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from services.common.adapter_format import read_adapter

LAYERS = 32
RANK = 16
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
CONFIG = json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": ["q_proj"]}).encode()


def main() -> None:
    """Measure every dtype and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="size of each file")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            path = Path(folder) / f"{dtype}.safetensors"
            size_bytes = write_adapter(path, dtype, options.megabytes * 1_000_000)
            results[dtype] = measure(path, size_bytes, options.rounds)
            path.unlink()
            print(dtype, results[dtype])
    print(json.dumps({"bench": "adapter_check", "megabytes": options.megabytes, "dtypes": results}))


def write_adapter(path: Path, dtype: str, size_bytes: int) -> int:
    """Write an adapter of about `size_bytes` with random weights; return its true size."""
    item_bytes = np.dtype(DTYPES[dtype]).itemsize
    width = size_bytes // (LAYERS * 2 * RANK * item_bytes)
    random = np.random.default_rng(0)
    header: dict[str, object] = {}
    offset = 0
    for layer in range(LAYERS):
        for side, shape in (("A", (RANK, width)), ("B", (width, RANK))):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
            end = offset + RANK * width * item_bytes
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(2 * LAYERS):
            values = random.standard_normal(RANK * width, dtype=np.float32) * np.float32(0.01)
            stored = (values.view("<u4") >> 16).astype("<u2") if dtype == "BF16" else values
            file.write(stored.astype(DTYPES[dtype], copy=False).tobytes())
    return path.stat().st_size


def measure(path: Path, size_bytes: int, rounds: int) -> dict[str, float]:
    """Return MB/s of the check, of the check with its hash, and of the hash alone."""
    digest = hash_file(path)
    ways: dict[str, Callable[[], object]] = {
        "sha256": lambda: hash_file(path),
        "check": lambda: read_adapter(CONFIG, path, weights_digest=digest),
        "read": lambda: read_adapter(CONFIG, path),
    }
    turns = [{name: timed(way) for name, way in ways.items()} for _ in range(rounds)]
    seconds = {name: min(turn[name] for turn in turns) for name in ways}
    rates = {f"{name}_mb_per_second": round(size_bytes / 1e6 / value) for name, value in seconds.items()}
    return rates | {"check_per_sha256": round(seconds["check"] / seconds["sha256"], 2)}


def hash_file(path: Path) -> str:
    """Return the digest of the file at `path`."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def timed(way: Callable[[], object]) -> float:
    """Return the processor seconds that `way` takes."""
    start = time.process_time()
    way()
    return time.process_time() - start


if __name__ == "__main__":
    main()
