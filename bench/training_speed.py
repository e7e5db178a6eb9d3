"""How fast jobs train, alone and together, and what they hold in memory; on a 4-bit base.

Three measurements on one 120M-parameter base in NF4 (see small_llama), LoRA of rank 16 on every linear layer:

- alone: tokens per second of one job beside `transformers.Trainer` with PEFT on the same rows and settings,
  in turns. Every token counts in the loss, which leaves us no advantage by the output head.
- together: eight jobs of one row a step, together and one after another, in turns; by the length of the rows,
  a quarter of which counts.
- memory: the highest resident size of a process while it trains, of one job and of eight together, over the
  size of the process with the base alone. Each in a process of its own.

Seconds are those of the processor, on one thread unless asked otherwise: what a quiet machine would take,
measurable on a busy one. The last line is JSON.

    python -m bench.training_speed
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from bench.small_llama import TARGETS, VOCAB_SIZE, make_base
from services.common.base_loading import load_base_model
from services.common.fingerprint import ComputeDtype, Quantization
from services.trainer.dataset import PromptRow
from services.trainer.job import Progress
from services.trainer.spec import TrainingSpec
from services.trainer.tokens import TokenRow
from services.trainer.training.base import BaseFolder, SharedBase
from services.trainer.training.batches import BatchPlan
from services.trainer.training.initialise import new_adapter
from services.trainer.training.loop import TrainingRun
from services.trainer.training.model import AdapterModel
from services.trainer.training.together import shared_pass

CPU = torch.device("cpu")
NF4 = Quantization.nf4(ComputeDtype.FLOAT32)
JOBS = 8
ALONE_BATCH, ALONE_TOKENS = 4, 128
# Of a row's tokens, one in so many counts where jobs train together: those of the completion.
TOGETHER_TOKENS, COUNTED_SHARE = (16, 32, 64), 4
MEMORY_TOKENS = 128
WARM_STEPS = 1


class Silent:
    """An observer that keeps nothing."""

    def check(self) -> None:
        """Never ends the run."""

    def between_steps(self, run: TrainingRun) -> None:
        """Never ends the run."""

    def stepped(self, progress: Progress) -> None:
        """Take no note."""

    def skipped(self, step: int, bad_steps: int) -> None:
        """Take no note."""

    def stopped_early(self, step: int, best_valid_loss: float) -> None:
        """Take no note."""

    def checkpoint(self, run: TrainingRun) -> None:
        """Keep nothing."""


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Notes when each step of a `transformers.Trainer` has ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        """Note the time."""
        self.times.append(time.process_time())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--out", type=Path, help="where the JSON is kept as well")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    if options.memory_of is not None:
        print(json.dumps(held_bytes(options.base, options.memory_of)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = make_base(Path(folder) / "base")
        results: dict[str, Any] = {
            "bench": "training_speed",
            "threads": options.threads,
            "torch": torch.__version__,
        }
        results["alone"] = alone(path, options.steps, options.rounds, Path(folder))
        print(results["alone"])
        base = SharedBase.load(BaseFolder("base", path, NF4), CPU)
        results["together"] = [
            together(base, tokens, options.steps, options.rounds) for tokens in TOGETHER_TOKENS
        ]
        print(*results["together"], sep="\n")
        results["memory"] = memory(path, options.threads)
        print(results["memory"])
    line = json.dumps(results)
    if options.out is not None:
        options.out.write_text(line + "\n", encoding="ascii")
    print(line)


def rows(count: int, tokens: int, *, seed: int, counted: int | None = None) -> list[TokenRow]:
    """Return rows of random tokens of which the last `counted` count; all, when None."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, VOCAB_SIZE, (count, tokens), generator=generator)
    learned = tokens - 1 if counted is None else counted
    mask = (*[False] * (tokens - learned), *[True] * learned)
    return [TokenRow(tuple(ids), mask, 1, PromptRow(1, "p", "c")) for ids in drawn.tolist()]


def new_run(base: SharedBase, data: Sequence[TokenRow], batch_size: int, seed: int) -> TrainingRun:
    """Return a run as a job of the default recipe has it."""
    spec = TrainingSpec(max_seq_len=2048, target_modules=TARGETS, batch_size=batch_size, n_epochs=1)
    model = AdapterModel(base, new_adapter(base, spec, seed=seed), spec, pad_id=0)
    return TrainingRun(model, BatchPlan(data, batch_size, 1, 1, seed), spec, Silent(), seed=seed)


def alone(path: Path, steps: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Return tokens per second of our loop and of `transformers.Trainer`, and our share of its speed."""
    base = SharedBase.load(BaseFolder("base", path, NF4), CPU)
    data = rows((steps + WARM_STEPS) * ALONE_BATCH, ALONE_TOKENS, seed=0)

    def ours() -> float:
        run = new_run(base, data, ALONE_BATCH, 0)
        return timed(lambda: shared_pass(base, [run]), steps)

    trainers = iter([plain_trainer(path, data, folder / str(number)) for number in range(rounds)])

    def theirs() -> float:
        trainer, clock = next(trainers)
        trainer.train()
        return (clock.times[-1] - clock.times[WARM_STEPS - 1]) / steps

    pairs = [(ours(), theirs()) for _ in range(rounds)]
    tokens = ALONE_BATCH * ALONE_TOKENS
    return {
        "batch": ALONE_BATCH,
        "row_tokens": ALONE_TOKENS,
        "tokens_per_second": round(tokens / statistics.median(one for one, _ in pairs)),
        "plain_trainer_tokens_per_second": round(tokens / statistics.median(other for _, other in pairs)),
        "speed_over_plain_trainer": round(statistics.median(other / one for one, other in pairs), 3),
    }


def plain_trainer(path: Path, data: Sequence[TokenRow], folder: Path) -> tuple[Trainer, StepClock]:
    """Return a `transformers.Trainer` over PEFT's LoRA with the settings of `new_run`."""
    spec = TrainingSpec(max_seq_len=2048)
    model = load_base_model(path, NF4, device=CPU, attention="sdpa")
    config = LoraConfig(
        r=spec.rank, lora_alpha=int(spec.alpha), target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=ALONE_BATCH,
        num_train_epochs=1,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    clock = StepClock()
    dataset = [{"input_ids": list(row.ids), "labels": list(row.ids)} for row in data]
    trainer = Trainer(
        model=get_peft_model(model, config), args=arguments, train_dataset=dataset, callbacks=[clock]
    )
    return trainer, clock


def together(base: SharedBase, row_tokens: int, steps: int, rounds: int) -> dict[str, Any]:
    """Return tokens per second of `JOBS` jobs together and one after another."""
    counted = row_tokens // COUNTED_SHARE

    def fresh() -> list[TrainingRun]:
        count = steps + WARM_STEPS
        return [
            new_run(base, rows(count, row_tokens, seed=job, counted=counted), 1, job) for job in range(JOBS)
        ]

    def joint() -> float:
        runs = fresh()
        return timed(lambda: shared_pass(base, runs), steps)

    def in_turn() -> float:
        return sum(timed(partial(shared_pass, base, [run]), steps) for run in fresh())

    pairs = [(joint(), in_turn()) for _ in range(rounds)]
    tokens = JOBS * row_tokens
    return {
        "jobs": JOBS,
        "row_tokens": row_tokens,
        "together_tokens_per_second": round(tokens / statistics.median(one for one, _ in pairs)),
        "in_turn_tokens_per_second": round(tokens / statistics.median(other for _, other in pairs)),
        "speedup": round(statistics.median(other / one for one, other in pairs), 3),
    }


def timed(step: Callable[[], object], steps: int) -> float:
    """Return the mean seconds of a step, after the first."""
    for _ in range(WARM_STEPS):
        step()
    started = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - started) / steps


def memory(path: Path, threads: int) -> dict[str, Any]:
    """Return the bytes of processes that train one job, and eight together."""
    found = {}
    for jobs in (1, JOBS):
        command = [sys.executable, "-m", "bench.training_speed", "--threads", str(threads)]
        command += ["--memory-of", str(jobs), "--base", str(path)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[jobs] = json.loads(output.splitlines()[-1])
    one, eight = found[1], found[JOBS]
    job_bytes = one["peak_bytes"] - one["base_bytes"]
    limit = one["base_bytes"] + JOBS * job_bytes
    return {
        "base_process_bytes": one["base_bytes"],
        "one_job_bytes": job_bytes,
        "eight_jobs_peak_bytes": eight["peak_bytes"],
        "limit_bytes": limit,
        "within_limit": eight["peak_bytes"] <= limit,
        "share_of_eight_processes": round(eight["peak_bytes"] / (JOBS * one["peak_bytes"]), 3),
    }


def held_bytes(path: Path, jobs: int) -> dict[str, int]:
    """Return this process's resident bytes with the base, and their peak while `jobs` jobs train together."""
    base = SharedBase.load(BaseFolder("base", path, NF4), CPU)
    base_bytes = status_bytes("VmRSS")
    # From here on the peak is that of training: loading the base holds more for a moment.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    runs = [new_run(base, rows(4, MEMORY_TOKENS, seed=job), 1, job) for job in range(jobs)]
    for _ in range(3):
        shared_pass(base, runs)
    return {"base_bytes": base_bytes, "peak_bytes": status_bytes("VmHWM")}


def status_bytes(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    assert match is not None, "Linux tells it"
    return int(match[1]) * 1024


if __name__ == "__main__":
    main()
