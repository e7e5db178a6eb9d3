"""What decoding costs on a GPU, against the time to read its bytes once, and against PEFT.

One 8B-shaped base with random weights, NF4 or bfloat16. For 1, 32 and 128 sequences with 0, 1, 32 and 128
distinct adapters of rank 16 on all seven linear layers (never more adapters than sequences), decode steps
are timed after all prompts are in. The floor of a step is what it must read - weights, keys and values of
the middle step, and each distinct adapter - over the bandwidth of a copy, measured in the same run. Then PEFT
generates the same, by `adapter_names` and transformers' `generate`. The last line is JSON.

    python -m bench.gpu_decode
    python -m bench.gpu_decode --device cpu --shape tiny --rows 1 4 --adapters 0 1 4 --peft-adapters 0 4
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from bench.gpu_base import SHAPES, OneFolder, copy_bytes_per_second, make_base, seconds, synchronise
from bench.mixed_batch import load_peft, run_peft
from services.inference.assembly import build_engine
from services.inference.config import EngineConfig
from services.inference.engine.engine import Engine
from services.inference.engine.request import Request, SamplingParams
from services.inference.model.kv import KvShape

BLOCK_SIZE = 16
WARM_STEPS = 3
# On a CPU the KV cache takes memory by larger pieces than a tiny model needs.
_LEAST_KV_BYTES = 16 << 20


def main() -> None:
    """Measure, and print a line for each case and one of JSON."""
    options = parse_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"bench": "gpu_decode", "skipped": "there is no CUDA device"}))
        return
    disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    device = torch.device(options.device)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        options.base = make_base(scratch / "base", options.shape, device)
        folder = OneFolder(options.base, scratch / "adapter", rank=options.rank)
        bandwidth = copy_bytes_per_second(device)
        engine_cases, graphs = measure_engine(options, folder, scratch, bandwidth)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        peft_cases = measure_peft(options, folder) if options.peft_adapters else []
    result = {
        "bench": "gpu_decode",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **{key: getattr(options, key) for key in ("shape", "quantization", "rank", "prompt_tokens")},
        "steps": options.steps,
        "captured_steps": graphs,
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
        "engine": engine_cases,
        "peft": peft_cases,
    }
    print(json.dumps(result))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("--kernels", choices=("auto", "torch", "triton"), default="auto")
    parser.add_argument("--decode-graphs", choices=("auto", "off", "eager"), default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 32, 128])
    parser.add_argument("--peft-adapters", type=int, nargs="*", default=[0, 1, 32])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64, help="timed decode steps of a case")
    parser.add_argument("--scratch", type=Path, help="where some 20 GB may be written for a while")
    options = parser.parse_args()
    options.threads = 0
    return options


def measure_engine(
    options: argparse.Namespace, folder: OneFolder, scratch: Path, bandwidth: float
) -> tuple[list[dict[str, Any]], int]:
    """Time every case on one engine; return the cases, and how many steps it has captured."""
    config = settings(options, folder, scratch / "cache")
    engine = build_engine(config, folder)
    shape = KvShape.of(engine._base.model.config, BLOCK_SIZE, engine._base.dtype)
    weight_bytes = count_weight_bytes(engine._base.model)
    mean_length = options.prompt_tokens + WARM_STEPS + options.steps // 2
    kv_bytes = mean_length * shape.block_bytes // BLOCK_SIZE
    cases = []
    for rows in options.rows:
        for distinct in (count for count in options.adapters if count <= rows):
            step_seconds = time_decode(engine, options, rows, distinct)
            adapter_bytes = sum(
                entry.size_bytes for entry in engine.adapters.residency() if entry.digest in digests(distinct)
            )
            floor_bytes = weight_bytes + rows * kv_bytes + adapter_bytes
            floor = floor_bytes / bandwidth
            cases.append(
                {
                    "rows": rows,
                    "adapters": distinct,
                    "tokens_per_second": round(rows / step_seconds, 1),
                    "step_ms": round(1e3 * step_seconds, 3),
                    "floor_ms": round(1e3 * floor, 3),
                    "share_of_floor": round(floor / step_seconds, 3),
                }
            )
            print("engine", cases[-1])
    engine.adapters.close()
    graphs = engine._runner._graphs
    return cases, 0 if graphs is None else len(graphs)


def settings(options: argparse.Namespace, folder: OneFolder, cache: Path) -> EngineConfig:
    """Return an engine's settings with memory for the largest case, and nothing kept between cases."""
    rows = max(options.rows)
    tokens = options.prompt_tokens + WARM_STEPS + options.steps + BLOCK_SIZE
    config = AutoConfig.from_pretrained(options.base, local_files_only=True)
    shape = KvShape.of(config, BLOCK_SIZE, torch.float32)
    adapter_bytes = (folder.folder / "adapter_model.safetensors").stat().st_size
    room = (max(options.adapters) + 1) * adapter_bytes
    return EngineConfig(
        base_path=options.base,
        adapter_cache_path=cache,
        quantization=options.quantization,
        compute_dtype=options.dtype,
        device=options.device,
        kernels=options.kernels,
        decode_graphs=options.decode_graphs,
        block_size=BLOCK_SIZE,
        max_model_len=tokens,
        max_num_seqs=rows,
        max_batch_tokens=rows * options.prompt_tokens,
        enable_prefix_cache=False,
        kv_bytes=max((rows * -(-tokens // BLOCK_SIZE) + 2) * shape.block_bytes, _LEAST_KV_BYTES),
        adapter_device_bytes=room,
        adapter_host_bytes=room,
        adapter_disk_bytes=room,
    )


def time_decode(engine: Engine, options: argparse.Namespace, rows: int, distinct: int) -> float:
    """Return the median seconds of a step in which every one of `rows` sequences gets a token."""
    sampling = SamplingParams(max_tokens=1 + WARM_STEPS + options.steps + 1, temperature=0.0, ignore_eos=True)
    names = digests(distinct)
    leases = [engine.adapters.acquire(name) for name in names]
    while not all(lease.ready for lease in leases):
        failed = next((lease.error for lease in leases if lease.error is not None), None)
        if failed is not None:
            raise failed
        time.sleep(0.001)
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    for row in range(rows):
        prompt = torch.randint(1, vocabulary, (options.prompt_tokens,), generator=generator).tolist()
        engine.add(Request(str(row), tuple(prompt), sampling, names[row % distinct] if distinct else None))
    engine.step()
    assert engine.stats().running == rows, "all prompts go into one step"
    device = engine._base.device
    for _ in range(WARM_STEPS):
        engine.step()
    spent = []
    for _ in range(options.steps):
        made = engine.stats().completion_tokens
        spent.append(seconds(engine.step, device))
        assert engine.stats().completion_tokens == made + rows, "a sequence had to wait"
    for row in range(rows):
        engine.abort(str(row))
    for lease in leases:
        lease.release()
    return statistics.median(spent)


def digests(count: int) -> list[str]:
    return [f"sha256:{number:064x}" for number in range(count)]


def count_weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of everything that a decode step reads of the base: all but the embedding."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    total = sum(module.weight.nbytes for module in linears)
    for module in linears:
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            total += state.absmax.nbytes + (0 if state.state2 is None else state.state2.absmax.nbytes)
    return total


def measure_peft(options: argparse.Namespace, folder: OneFolder) -> list[dict[str, Any]]:
    """Time PEFT with the same base and as many adapters, where there are that many rows."""
    count = max(1, *options.peft_adapters)
    folders = {f"adapter{number}": folder.folder for number in range(count)}
    model = load_peft(argparse.Namespace(**{**vars(options), "rows": max(options.rows)}), folders)
    cases = []
    for rows in options.rows:
        prompts = torch.randint(
            1, SHAPES[options.shape]["vocab_size"], (rows, options.prompt_tokens)
        ).tolist()
        for distinct in (number for number in options.peft_adapters if number <= rows):
            names = [f"adapter{row % distinct}" if distinct else "__base__" for row in range(rows)]
            run_peft(model, prompts, names, 2)
            synchronise(model.device)
            rate = run_peft(model, prompts, names, options.steps).decode
            cases.append({"rows": rows, "adapters": distinct, "tokens_per_second": round(rate, 1)})
            print("peft", cases[-1])
    return cases


if __name__ == "__main__":
    main()
