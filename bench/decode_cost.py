"""What a decode step costs on a CPU, against what its bytes and operations must cost.

A 120M-parameter Llama with random weights, 16 requests of 64 + 64 tokens, float32. One run measures, in turns
so that a busy machine disturbs all alike: the bandwidth of reading memory, the best rate of a matrix
product, a decode step with no adapter and with 1, 4 and 16 distinct adapters of rank 16 on all seven linear
layers, and a base-only step of an engine that has loaded 1000 adapters. Engines take their steps alternately,
and differences are taken between neighbouring steps. The last line is JSON.

    python -m bench.decode_cost
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from bench.small_llama import make_adapter, make_base, make_prompts
from services.inference.assembly import build_engine
from services.inference.config import EngineConfig
from services.inference.engine.engine import Engine
from services.inference.engine.request import Request, SamplingParams

DISTINCT = (1, 4, 16)
ALLOWED_LORA = 1.5
ALLOWED_BASE_RATIO = 0.98
AIM_STEP = 1.7
MEASURE_EVERY = 4
GIB = 1 << 30


class Machine:
    """What the machine can do: medians of measurements made between the steps, as the steps' own are."""

    def __init__(self) -> None:
        self._read = torch.ones(50 << 20)
        self._square = torch.ones(1024, 1024)
        self._rates: list[tuple[float, float]] = []

    def measure(self) -> None:
        """Read 200 MiB, and multiply 1024 x 1024 matrices."""
        read = seconds(self._read.sum)
        multiplied = seconds(lambda: self._square @ self._square)
        self._rates.append((self._read.nbytes / read, 2 * 1024**3 / multiplied))

    @property
    def bytes_per_second(self) -> float:
        """The bandwidth of reading memory."""
        return statistics.median(rate for rate, _ in self._rates)

    @property
    def best_bytes_per_second(self) -> float:
        """The largest bandwidth that was ever measured."""
        return max(rate for rate, _ in self._rates)

    @property
    def flops(self) -> float:
        """The rate of a matrix product."""
        return statistics.median(rate for _, rate in self._rates)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measure, and print a table and a line of JSON."""
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        machine = Machine()
        bench = Bench(options, scratch, machine)
        rounds = [bench.round() for _ in range(options.rounds)]
        registered = [bench.registered_round() for _ in range(options.rounds)]
        report(options, bench, machine, rounds, registered)
        bench.close()


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is the library's choice")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", choices=("auto", "torch"), default="auto")
    return parser.parse_args()


class Folders:
    """Fetches adapters from local folders; digests beyond the known ones get the small adapter."""

    def __init__(self, folders: Mapping[str, Path], small: Path) -> None:
        self._folders = folders
        self._small = small

    def fetch(self, digest: str, into: Path) -> None:
        folder = self._folders.get(digest, self._small)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(folder / name, into / name)


class Bench:
    """One engine per number of distinct adapters, and one that has loaded many."""

    def __init__(self, options: argparse.Namespace, scratch: Path, machine: Machine) -> None:
        self.options = options
        self._machine = machine
        self.base = make_base(scratch / "base")
        folders = {
            digest(n): make_adapter(self.base, scratch / f"adapter-{n}", rank=options.rank, seed=n)
            for n in range(max(DISTINCT))
        }
        self.adapter_bytes = (folders[digest(0)] / "adapter_model.safetensors").stat().st_size
        small = make_adapter(self.base, scratch / "small", rank=2, seed=0, targets=("q_proj", "v_proj"))
        self._folders = Folders(folders, small)
        self._prompts = make_prompts(options.rows, options.prompt_tokens)
        self._engines = {n: self._engine(scratch / f"cache-{n}") for n in (0, *DISTINCT)}
        for n, engine in self._engines.items():
            load(engine, [digest(k) for k in range(n)])
        self._crowded = self._engine(scratch / "cache-crowded")
        load(self._crowded, [digest(100 + n) for n in range(options.registered)])
        self.round()
        self.registered_round()

    def _engine(self, cache: Path) -> Engine:
        options = self.options
        config = EngineConfig(
            base_path=self.base,
            adapter_cache_path=cache,
            quantization="none",
            compute_dtype="float32",
            device="cpu",
            cpu_threads=options.threads,
            kernels=options.kernels,
            max_num_seqs=options.rows,
            adapter_device_bytes=GIB,
            adapter_host_bytes=GIB,
            kv_bytes=GIB // 4,
        )
        return build_engine(config, self._folders)

    def round(self) -> dict[int, list[float]]:
        """Run the batch on every engine, a step of each in turn; return the seconds of each decode step."""
        return self._run(self._engines)

    def registered_round(self) -> dict[int, list[float]]:
        """Run base-only requests on the empty engine (0) and on the one that has loaded many (1)."""
        return self._run({0: self._engines[0], 1: self._crowded}, base_only=True)

    def _run(self, engines: Mapping[int, Engine], *, base_only: bool = False) -> dict[int, list[float]]:
        options = self.options
        sampling = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
        for n, engine in engines.items():
            distinct = 0 if base_only else n
            for row, prompt in enumerate(self._prompts):
                adapter = digest(row % distinct) if distinct else None
                engine.add(Request(str(row), tuple(prompt), sampling, adapter))
            while engine.stats().completion_tokens % (options.rows * options.tokens) < options.rows:
                engine.step()
        spent: dict[int, list[float]] = {n: [] for n in engines}
        # The first token came with the prompt.
        for step in range(options.tokens - 1):
            if step % MEASURE_EVERY == 0:
                self._machine.measure()
            # In turns forwards and backwards, so that no engine always follows the same one.
            for n in list(engines)[:: 1 if step % 2 else -1]:
                spent[n].append(seconds(engines[n].step))
        assert not any(engine.has_work for engine in engines.values())
        return spent

    def step_bytes(self) -> int:
        """Bytes that a base-only decode step must read: the linear layers, the head, and the keys and values
        of the middle step.
        """
        weights, keys = self._weights_and_keys()
        length = self.options.prompt_tokens + self.options.tokens // 2
        return 4 * (weights + 2 * int(self.options.rows) * int(length) * keys)

    def step_operations(self) -> int:
        """Multiplications and additions of a base-only decode step's linear layers."""
        weights, _ = self._weights_and_keys()
        return 2 * int(self.options.rows) * weights

    def _weights_and_keys(self) -> tuple[int, int]:
        """Weights of all linear layers and the head, and elements of one token's keys in all layers."""
        config = LlamaConfig.from_pretrained(self.base)
        hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
        keys = hidden * int(config.num_key_value_heads) // int(config.num_attention_heads)
        each = 2 * hidden * (hidden + keys) + 3 * hidden * int(config.intermediate_size)
        return layers * each + int(config.vocab_size) * hidden, layers * keys

    def close(self) -> None:
        """End the loaders."""
        for engine in (*self._engines.values(), self._crowded):
            engine.adapters.close()


def digest(number: int) -> str:
    return f"{number:064x}"


def load(engine: Engine, digests: Sequence[str]) -> None:
    """Bring adapters to memory, and leave them there unused."""
    for name in digests:
        lease = engine.adapters.acquire(name)
        while not lease.ready:
            assert lease.error is None, lease.error
            time.sleep(0.0005)
        lease.release()


def report(
    options: argparse.Namespace,
    bench: Bench,
    machine: Machine,
    rounds: Sequence[Mapping[int, Sequence[float]]],
    registered: Sequence[Mapping[int, Sequence[float]]],
) -> None:
    """Print a table, and the same as JSON on the last line."""
    steps = {n: [one for each in rounds for one in each[n]] for n in (0, *DISTINCT)}
    base = statistics.median(steps[0])
    floor = max(bench.step_bytes() / machine.bytes_per_second, bench.step_operations() / machine.flops)
    result: dict[str, Any] = {
        "bench": "decode_cost",
        "kernels": options.kernels,
        "threads": torch.get_num_threads(),
        "rows": options.rows,
        "rank": options.rank,
        "prompt_tokens": options.prompt_tokens,
        "decode_tokens": options.tokens,
        "rounds": options.rounds,
        "read_gigabytes_per_second": round(machine.bytes_per_second / 1e9, 1),
        "best_read_gigabytes_per_second": round(machine.best_bytes_per_second / 1e9, 1),
        "gemm_gflops": round(machine.flops / 1e9),
        "step_floor_ms": round(floor * 1e3, 2),
        "base_step_ms": round(base * 1e3, 2),
        "base_step_times_floor": round(base / floor, 2),
        "base_step_aim": AIM_STEP,
        "lora": {},
    }
    print(
        f"reads {machine.bytes_per_second / 1e9:.1f} GB/s, multiplies at {machine.flops / 1e9:.0f} GFLOP/s; "
        f"floor of the base step {floor * 1e3:.2f} ms"
    )
    print(f"base only              {base * 1e3:7.2f} ms a step, {base / floor:.2f} x its floor")
    for n in DISTINCT:
        part = statistics.median(
            with_lora - without for with_lora, without in zip(steps[n], steps[0], strict=True)
        )
        bytes_read = n * bench.adapter_bytes
        least = bytes_read / machine.bytes_per_second
        whole = statistics.median(steps[n])
        result["lora"][str(n)] = {
            "step_ms": round(whole * 1e3, 2),
            "lora_ms": round(part * 1e3, 2),
            "read_once_ms": round(least * 1e3, 2),
            "times_read_once": round(part / least, 2),
            "allowed": ALLOWED_LORA,
            "step_times_floor": round(whole / (floor + least), 2),
        }
        print(
            f"{n:2} distinct adapters   {whole * 1e3:7.2f} ms a step, LoRA part {part * 1e3:6.2f} ms, "
            f"{part / least:.2f} x reading {bytes_read / 1e6:.0f} MB once ({least * 1e3:.2f} ms)"
        )
    ratio = statistics.median(
        without / with_many
        for each in registered
        for with_many, without in zip(each[1], each[0], strict=True)
    )
    result["registered"] = {
        "adapters": options.registered,
        "base_only_ratio": round(ratio, 4),
        "at_least": ALLOWED_BASE_RATIO,
    }
    print(f"base only, with {options.registered} adapters loaded: {ratio:.1%} of the speed without")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
