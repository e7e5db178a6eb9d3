"""What adapters cost in a batch: base only, one adapter, sixteen adapters, and PEFT's own mixed batch beside
them.

One run serves the same prompts four ways on one base: the engine with no adapter, with one, and with one
adapter per row; then PEFT's `adapter_names` path over transformers' `generate`, with one adapter per row.
Each way is repeated and the ways take turns, so that a busy machine disturbs all alike; medians are reported.
The last line is JSON.

    python -m bench.mixed_batch --base assets/base
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from services.common.base_loading import load_base_model
from services.inference.assembly import build_engine
from services.inference.config import EngineConfig
from services.inference.engine.engine import Engine
from services.inference.engine.request import Request, SamplingParams

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second of one batch, over all its rows."""

    prefill: float
    decode: float


def main() -> None:
    """Run every way in turn and print the medians."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_adapters(options, Path(scratch))
        prompts = make_prompts(options)
        engine = start_engine(options, folders, Path(scratch) / "cache")
        peft_model = load_peft(options, folders)
        names: list[str | None] = [*folders]
        ways: dict[str, Callable[[], Rates]] = {
            "base_only": lambda: run_engine(engine, prompts, [None] * options.rows, options.tokens),
            "one_adapter": lambda: run_engine(engine, prompts, names[:1] * options.rows, options.tokens),
            "adapter_per_row": lambda: run_engine(engine, prompts, names, options.tokens),
            "peft_adapter_per_row": lambda: run_peft(peft_model, prompts, list(folders), options.tokens),
        }
        for way in ways.values():
            way()
        rounds = [{name: way() for name, way in ways.items()} for _ in range(options.rounds)]
        engine.adapters.close()
    report(options, rounds)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("assets/base"))
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is the library's choice")
    parser.add_argument("--rows", type=int, default=16, help="sequences in the batch, and adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode per row")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def settings(options: argparse.Namespace, cache: Path) -> EngineConfig:
    return EngineConfig(
        base_path=options.base,
        adapter_cache_path=cache,
        quantization=options.quantization,
        device=options.device,
        compute_dtype=options.dtype,
        cpu_threads=options.threads,
        max_batch_tokens=options.rows * options.prompt_tokens,
        max_num_seqs=options.rows,
        adapter_device_bytes=8 << 30,
        adapter_host_bytes=8 << 30,
        adapter_stack_bytes=8 << 30,
        kv_bytes=2 << 30,
    )


def make_adapters(options: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """Write one random adapter per row; return version digests and folders."""
    base = AutoModelForCausalLM.from_pretrained(options.base, local_files_only=True, dtype=torch.float32)
    config = LoraConfig(
        r=options.rank, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    folders = {}
    for number in range(options.rows):
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        folder = scratch / f"adapter-{number}"
        model.save_pretrained(folder)
        folders[f"{number:064x}"] = folder
    return folders


def make_prompts(options: argparse.Namespace) -> list[list[int]]:
    config = AutoConfig.from_pretrained(options.base, local_files_only=True)
    generator = torch.Generator().manual_seed(0)
    shape = (options.rows, options.prompt_tokens)
    prompts: list[list[int]] = torch.randint(8, config.vocab_size, shape, generator=generator).tolist()
    return prompts


class Folders:
    """Fetches adapters from local folders."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders

    def fetch(self, digest: str, into: Path) -> None:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(self._folders[digest] / name, into / name)


def start_engine(options: argparse.Namespace, folders: Mapping[str, Path], cache: Path) -> Engine:
    return build_engine(settings(options, cache), Folders(folders))


def run_engine(
    engine: Engine, prompts: Sequence[list[int]], adapters: Sequence[str | None], tokens: int
) -> Rates:
    """Prefill all rows in one step, then decode them together."""
    sampling = SamplingParams(max_tokens=tokens + 1, temperature=0.0, ignore_eos=True)
    leases = [engine.adapters.acquire(digest) for digest in adapters if digest is not None]
    while not all(lease.ready for lease in leases):
        time.sleep(0.001)
    for row, (prompt, digest) in enumerate(zip(prompts, adapters, strict=True)):
        engine.add(Request(str(row), tuple(prompt), sampling, digest))
    started = time.perf_counter()
    engine.step()
    prefilled = time.perf_counter()
    while engine.has_work:
        engine.step()
    ended = time.perf_counter()
    for lease in leases:
        lease.release()
    return rates(prompts, tokens, prefilled - started, ended - prefilled)


def load_peft(options: argparse.Namespace, folders: Mapping[str, Path]) -> PeftModel:
    """Load the base as the engine does, and every adapter into PEFT."""
    config = settings(options, Path())
    base = load_base_model(
        options.base, config.base_quantization, device=torch.device(config.device_type), attention="sdpa"
    )
    first, *others = folders
    model = PeftModel.from_pretrained(base, str(folders[first]), adapter_name=first)
    for name in others:
        model.load_adapter(str(folders[name]), adapter_name=name)
    return model.eval()


@torch.inference_mode()
def run_peft(model: PeftModel, prompts: Sequence[list[int]], names: Sequence[str], tokens: int) -> Rates:
    """Generate with PEFT's `adapter_names`: a first call of one token for the prefill, a second for all."""
    ids = torch.tensor(prompts, device=model.device)
    common: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "adapter_names": list(names),
        "do_sample": False,
        "pad_token_id": 0,
    }
    started = time.perf_counter()
    model.generate(**common, min_new_tokens=1, max_new_tokens=1)
    prefilled = time.perf_counter()
    model.generate(**common, min_new_tokens=tokens + 1, max_new_tokens=tokens + 1)
    ended = time.perf_counter()
    prefill_seconds = prefilled - started
    return rates(prompts, tokens, prefill_seconds, ended - prefilled - prefill_seconds)


def rates(prompts: Sequence[list[int]], tokens: int, prefill_seconds: float, decode_seconds: float) -> Rates:
    return Rates(sum(map(len, prompts)) / prefill_seconds, len(prompts) * tokens / decode_seconds)


def report(options: argparse.Namespace, rounds: Sequence[Mapping[str, Rates]]) -> None:
    """Print a table, and the same as JSON on the last line."""
    config = settings(options, Path())
    result: dict[str, Any] = {
        "bench": "mixed_batch",
        "base": options.base.name,
        "quantization": options.quantization,
        "device": config.device_type,
        "dtype": config.base_quantization.compute_dtype.value,
        "threads": torch.get_num_threads(),
        "rows": options.rows,
        "rank": options.rank,
        "prompt_tokens": options.prompt_tokens,
        "decode_tokens": options.tokens,
        "rounds": options.rounds,
    }
    for name in rounds[0]:
        prefill = statistics.median(one[name].prefill for one in rounds)
        decode = statistics.median(one[name].decode for one in rounds)
        result[name] = {
            "prefill_tokens_per_second": round(prefill),
            "decode_tokens_per_second": round(decode),
        }
        print(f"{name:22} prefill {prefill:9.0f} tok/s   decode {decode:8.0f} tok/s")
    print(json.dumps(result))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    main()
