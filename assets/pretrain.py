"""Pretrains the bundled base model on the CPU.

    python -m assets.pretrain --corpus CORPUS --out assets/base --stage reading --stop-at-minutes 83
    python -m assets.pretrain --corpus CORPUS --out assets/base --stage copying --stop-at-minutes 60

A stage is over when its token budget is read or its time is up, whichever is first; the learning rate is a
function of that progress, so a stage always ends annealed. It resumes from its checkpoint, and exports the
model as it goes. The second stage begins with the weights and moments that the first one ended with.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import AdamW, Muon, Optimizer
from transformers import LlamaForCausalLM

from assets.base_model import export_base, new_base
from assets.schedule import LONG_ROW_TOKENS, STAGES, batch_plan, learning_rate_factor
from assets.streams import BatchReader, load_streams
from assets.training_state import RunCounters, load_state, save_state

GRADIENT_CLIP = 1.0
LOG_EVERY_STEPS = 10
CHECKPOINT_EVERY_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class RunSettings:
    """One stage's run: where it reads and writes, how long it lasts, and its optimiser."""

    stage: str
    corpus: Path
    out: Path
    cache: Path
    stop_at_minutes: float
    token_budget: int
    batch_tokens: int
    instruction_chats: int
    export_every_minutes: float
    optimizer: str
    muon_rate: float
    adam_rate: float
    threads: int
    device: str
    seed: int

    @property
    def checkpoint(self) -> Path:
        """Where the stage keeps its state."""
        return checkpoint_of(self.cache, self.stage)


def checkpoint_of(cache: Path, stage: str) -> Path:
    return cache / f"pretraining-{stage}.safetensors"


class PretrainingRun:
    """The training loop with its model, optimisers, reader and clock."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self._stage = STAGES[settings.stage]
        tokenizer_file = settings.out / "tokenizer.json"
        streams = load_streams(
            settings.corpus, tokenizer_file, settings.cache, settings.instruction_chats, settings.seed
        )
        self._reader = BatchReader(streams, settings.seed)
        self._device = torch.device(settings.device)
        self._model = new_base(settings.seed).to(self._device)
        self._optimizers = build_optimizers(self._model, settings)
        self._rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self._optimizers.items()}
        self._counters = RunCounters(step=0, tokens=0, elapsed_seconds=0.0, cursors=self._reader.cursors)
        self._log = settings.cache / f"training_log-{settings.stage}.jsonl"
        if settings.checkpoint.exists():
            self._counters = load_state(settings.checkpoint, self._model, self._optimizers)
            # A stream that is newer than the checkpoint begins at its start.
            self._counters.cursors = dict.fromkeys(streams, 0) | self._counters.cursors
            self._reader.cursors = self._counters.cursors
            drop_later_lines(self._log, self._counters.step)
        elif self._stage.after is not None:
            before = load_state(
                checkpoint_of(settings.cache, self._stage.after), self._model, self._optimizers
            )
            self._reader.cursors.update(before.cursors)

    def run(self) -> None:
        """Trains to the end; a checkpoint every few minutes, a model every `export_every_minutes`."""
        counters, settings = self._counters, self._settings
        last_tick = last_checkpoint = last_export = time.monotonic()
        while (progress := self._progress()) < 1.0:
            loss = self._step(progress)
            now = time.monotonic()
            counters.elapsed_seconds += now - last_tick
            last_tick = now
            if counters.step % LOG_EVERY_STEPS == 0:
                self._write_log(loss, progress)
            if now - last_checkpoint > CHECKPOINT_EVERY_SECONDS:
                save_state(settings.checkpoint, self._model, self._optimizers, counters)
                last_checkpoint = now
            if now - last_export > 60.0 * settings.export_every_minutes:
                export_base(self._model, settings.out)
                last_export = now
        save_state(settings.checkpoint, self._model, self._optimizers, counters)
        export_base(self._model, settings.out)

    def _progress(self) -> float:
        by_tokens = self._counters.tokens / self._settings.token_budget
        by_time = self._counters.elapsed_seconds / (60.0 * self._settings.stop_at_minutes)
        return max(by_tokens, by_time)

    def _step(self, progress: float) -> float:
        """One update; returns the mean loss in nats a token."""
        counters = self._counters
        factor = learning_rate_factor(counters.step, progress)
        for name, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._rates[name] * factor
        plan = batch_plan(self._stage, progress, self._settings.batch_tokens)
        ids = torch.from_numpy(self._reader.read(counters.step, plan.rows, plan.row_tokens, plan.mix)).to(
            self._device
        )
        logits = self._model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), GRADIENT_CLIP)
        for optimizer in self._optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        counters.step += 1
        counters.tokens += ids.numel()
        return float(loss.item())

    def _write_log(self, loss: float, progress: float) -> None:
        counters = self._counters
        line = {
            "step": counters.step,
            "tokens": counters.tokens,
            "elapsed_seconds": round(counters.elapsed_seconds, 1),
            "loss": round(loss, 4),
            "rate_factor": round(learning_rate_factor(counters.step, progress), 4),
            "row_tokens": batch_plan(self._stage, progress, self._settings.batch_tokens).row_tokens,
        }
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")


def drop_later_lines(log: Path, step: int) -> None:
    """Drops the lines of steps after `step`, which a resumed run writes again."""
    if not log.exists():
        return
    lines = [
        line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step
    ]
    log.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def build_optimizers(model: LlamaForCausalLM, settings: RunSettings) -> dict[str, Optimizer]:
    """Returns the optimisers by name: AdamW for embeddings and norms, and Muon (or AdamW) for the matrices.

    Muon: Jordan et al. 2024, an orthogonalised momentum update for the hidden matrices.
    """
    inner = list(model.model.layers.named_parameters())
    matrices = [parameter for _, parameter in inner if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    matrix_optimizer: Optimizer
    if settings.optimizer == "muon":
        matrix_optimizer = Muon(
            matrices, lr=settings.muon_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"
        )
    else:
        matrix_optimizer = AdamW(
            matrices, lr=settings.adam_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
    rest_optimizer = AdamW(rest, lr=settings.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return {"matrices": matrix_optimizer, "rest": rest_optimizer}


def parse_settings() -> RunSettings:
    parser = argparse.ArgumentParser(description="Pretrain the bundled base model.")
    parser.add_argument("--stage", choices=tuple(STAGES), required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, default=Path("assets/base"), help="holds the tokenizer; gets the model"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("assets/.cache"), help="tokens, checkpoint and log"
    )
    parser.add_argument("--stop-at-minutes", type=float, default=70.0)
    parser.add_argument("--token-budget", type=int, default=12_000_000)
    parser.add_argument("--batch-tokens", type=int, default=4096, help=f"a multiple of {LONG_ROW_TOKENS}")
    parser.add_argument(
        "--instruction-chats", type=int, default=35_000, help="generated, with four rows each"
    )
    parser.add_argument("--export-every-minutes", type=float, default=12.0)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=0.003)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.batch_tokens <= 0 or arguments.batch_tokens % LONG_ROW_TOKENS:
        parser.error(f"--batch-tokens must be a multiple of {LONG_ROW_TOKENS}, not {arguments.batch_tokens}")
    return RunSettings(**vars(arguments))


def main() -> None:
    settings = parse_settings()
    torch.set_num_threads(settings.threads)
    PretrainingRun(settings).run()


if __name__ == "__main__":
    main()
