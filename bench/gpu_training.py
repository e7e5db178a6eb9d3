"""What training costs on a GPU: one job, and four together, on an 8B-shaped base in NF4.

The base has random weights; LoRA of rank 16 on every linear layer, rows of random tokens all of which count.
Reported are tokens a second, the most memory held, and the share of the rate of a large bfloat16 product that
was measured in the same run. The operations counted are those that must be: two for each weight and token in
the forward pass and two in the backward pass, since the base's own weights get no gradient. Four jobs of one
row each are then trained together and one after another. The last line is JSON.

    python -m bench.gpu_training
    python -m bench.gpu_training --device cpu --shape tiny --row-tokens 16 --steps 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from bench.gpu_base import SHAPES, make_base, product_flops, seconds
from bench.small_llama import TARGETS
from bench.training_speed import Silent
from services.common.fingerprint import ComputeDtype, Quantization
from services.trainer.dataset import PromptRow
from services.trainer.spec import TrainingSpec
from services.trainer.tokens import TokenRow
from services.trainer.training.base import BaseFolder, SharedBase
from services.trainer.training.batches import BatchPlan
from services.trainer.training.initialise import new_adapter
from services.trainer.training.loop import TrainingRun, peak_memory_bytes
from services.trainer.training.model import AdapterModel
from services.trainer.training.together import shared_pass

JOBS = 4
WARM_STEPS = 2
OPERATIONS_PER_WEIGHT = 4


def main() -> None:
    """Measure, and print a line for each way and one of JSON."""
    options = parse_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"bench": "gpu_training", "skipped": "there is no CUDA device"}))
        return
    disable_progress_bar()
    device = torch.device(options.device)
    dtype = ComputeDtype.BFLOAT16 if device.type == "cuda" else ComputeDtype.FLOAT32
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        path = make_base(Path(name) / "base", options.shape, device)
        base = SharedBase.load(BaseFolder("base", path, Quantization.nf4(dtype)), device)
    if options.gradient_checkpointing:
        base.checkpoint_activations()
    best_flops = product_flops(device, getattr(torch, dtype.value))
    result = {
        "bench": "gpu_training",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **{key: getattr(options, key) for key in ("shape", "rank", "row_tokens", "gradient_checkpointing")},
        "product_tflops": round(best_flops / 1e12, 2),
        "base_bytes": held_bytes(device),
        "alone": alone(base, options, best_flops),
        "together": together(base, options, best_flops),
    }
    print(json.dumps(result))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step of the job that trains alone")
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each way")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--scratch", type=Path, help="where some 20 GB may be written for a while")
    return parser.parse_args()


def alone(base: SharedBase, options: argparse.Namespace, best_flops: float) -> dict[str, Any]:
    """Measure one job."""
    reset_peak(base.device)
    run = new_run(base, options, options.batch, seed=0)
    step_seconds = timed(base, [run], options.steps)
    return figures(base, options.batch * options.row_tokens, step_seconds, best_flops)


def together(base: SharedBase, options: argparse.Namespace, best_flops: float) -> dict[str, Any]:
    """Measure `JOBS` jobs of one row a step, together and one after another."""
    in_turn = sum(timed(base, [new_run(base, options, 1, seed=job)], options.steps) for job in range(JOBS))
    reset_peak(base.device)
    runs = [new_run(base, options, 1, seed=job) for job in range(JOBS)]
    joint = timed(base, runs, options.steps)
    found = figures(base, JOBS * options.row_tokens, joint, best_flops)
    return {"jobs": JOBS, **found, "speedup_over_in_turn": round(in_turn / joint, 3)}


def figures(base: SharedBase, tokens: int, step_seconds: float, best_flops: float) -> dict[str, Any]:
    """Return what a step of `tokens` tokens that took `step_seconds` comes to."""
    operations = OPERATIONS_PER_WEIGHT * count_weights(base) * tokens
    found = {
        "step_tokens": tokens,
        "step_ms": round(1e3 * step_seconds, 2),
        "tokens_per_second": round(tokens / step_seconds, 1),
        "share_of_product_rate": round(operations / step_seconds / best_flops, 4),
        "peak_bytes": peak_memory_bytes(base.device),
    }
    print(found)
    return found


def new_run(base: SharedBase, options: argparse.Namespace, batch_size: int, *, seed: int) -> TrainingRun:
    """Return a run as a job of the default recipe has it, with rows for all steps."""
    count = batch_size * (WARM_STEPS + options.steps)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    drawn = torch.randint(1, vocabulary, (count, options.row_tokens), generator=generator)
    mask = (False, *[True] * (options.row_tokens - 1))
    rows = [TokenRow(tuple(ids), mask, 1, PromptRow(1, "p", "c")) for ids in drawn.tolist()]
    spec = TrainingSpec(
        max_seq_len=options.row_tokens,
        target_modules=TARGETS,
        rank=options.rank,
        batch_size=batch_size,
        n_epochs=1,
    )
    model = AdapterModel(base, new_adapter(base, spec, seed=seed), spec, pad_id=0)
    return TrainingRun(model, BatchPlan(rows, batch_size, 1, 1, seed), spec, Silent(), seed=seed)


def timed(base: SharedBase, runs: list[TrainingRun], steps: int) -> float:
    """Return the mean seconds of a step of all `runs`, after the first few."""

    def take(count: int) -> None:
        for _ in range(count):
            for error in shared_pass(base, runs).values():
                raise error

    take(WARM_STEPS)
    return seconds(lambda: take(steps), base.device) / steps


def count_weights(base: SharedBase) -> int:
    """Return the weights that every token is multiplied with: those of all linear layers."""
    return sum(
        module.in_features * module.out_features
        for module in base.model.modules()
        if isinstance(module, nn.Linear)
    )


def held_bytes(device: torch.device) -> int:
    """Return the device memory held now; on a CPU, the most that this process has held."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory_bytes(device)


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of the most memory held; a CPU's counts from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


if __name__ == "__main__":
    main()
