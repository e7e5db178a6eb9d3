"""The training loop: AdamW on the LoRA weights; a step follows from seed, number and weights alone."""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from services.common.errors import FailedPrecondition
from services.trainer.job import Progress
from services.trainer.spec import TrainingSpec
from services.trainer.tokens import TokenRow
from services.trainer.training.batches import BatchPlan
from services.trainer.training.checkpoint import RunState, StepFigures, read_run, write_run
from services.trainer.training.loss import summed_loss
from services.trainer.training.model import AdapterModel
from services.trainer.training.schedule import learning_rate
from services.trainer.training.validation import measure

BAD_STEPS_LIMIT = 3
RATE_WINDOW_STEPS = 10
# Held-out rows whose loss is measured at each checkpoint.
CHECKPOINT_VALIDATION_ROWS = 32


class RunObserver(Protocol):
    """Who a run reports to."""

    def check(self) -> None:
        """Raise to end the run; called before every forward pass."""
        ...

    def between_steps(self, run: TrainingRun) -> None:
        """Raise to end the run at a point that it can go on from."""
        ...

    def stepped(self, progress: Progress) -> None:
        """Take the figures of a step."""
        ...

    def skipped(self, step: int, bad_steps: int) -> None:
        """Take note of a step without an update, because its loss or gradient was not finite."""
        ...

    def checkpoint(self, run: TrainingRun) -> None:
        """Keep what `run.write` writes."""
        ...


class TrainingRun:
    """One job's training from its first step, or from a checkpoint, to its last."""

    def __init__(
        self,
        model: AdapterModel,
        plan: BatchPlan,
        spec: TrainingSpec,
        observer: RunObserver,
        *,
        seed: int,
        validation_rows: Sequence[TokenRow] = (),
    ) -> None:
        self.model = model
        self.plan = plan
        self.state = RunState()
        self._spec = spec
        self._observer = observer
        self._seed = seed
        self._validation_rows = validation_rows[:CHECKPOINT_VALIDATION_ROWS]
        self._parameters = model.parameters()
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=spec.learning_rate, weight_decay=spec.weight_decay
        )
        self._pace: deque[tuple[int, float]] = deque(maxlen=RATE_WINDOW_STEPS)
        self._epoch_order: tuple[int, list[list[int]]] = (-1, [])

    def resume(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`; raise `DataLoss` (`corrupt_checkpoint`) if it cannot be."""
        self.state = read_run(folder, self._parameters, self._optimizer)

    def write(self, folder: Path) -> None:
        """Write all that `resume` needs to `folder`."""
        write_run(folder, self._parameters, self._optimizer, self.state)

    def train(self) -> RunState:
        """Run the steps that are left and return the final state.

        Raises:
            FailedPrecondition: `diverged` after `BAD_STEPS_LIMIT` steps in a row without a finite gradient.
        """
        total_steps = self.plan.total_steps
        while self.state.step < total_steps:
            self._observer.between_steps(self)
            started = time.monotonic()
            figures = self._step(self._rows_of(self.state.step))
            self.state.step += 1
            if figures is None:
                self._count_bad_step()
            else:
                self.state.bad_steps = 0
                self.state.figures.append(figures)
                self._pace.append((figures.tokens, time.monotonic() - started))
                self._observer.stepped(self._progress(figures))
            if self.state.step % self._spec.checkpoint_steps == 0 or self.state.step == total_steps:
                self._validate()
                self._observer.checkpoint(self)
        return self.state

    def _rows_of(self, step: int) -> list[int]:
        epoch, position = divmod(step, self.plan.steps_per_epoch)
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, self.plan.epoch(epoch))
        return self._epoch_order[1][position]

    def _step(self, indices: list[int]) -> StepFigures | None:
        """Do one optimizer step on the rows `indices`; None where there was nothing finite to step by."""
        step = self.state.step
        rate = learning_rate(
            step,
            total_steps=self.plan.total_steps,
            peak=self._spec.learning_rate,
            warmup_ratio=self._spec.warmup_ratio,
            schedule=self._spec.schedule,
        )
        batches = self.plan.micro_batches(indices, self.model.pad_id)
        # Every counted token weighs the same, however the step is cut into forward passes.
        num_supervised = sum(batch.num_supervised for batch in batches)
        num_tokens = sum(batch.num_tokens for batch in batches)
        self.model.model.train()
        loss_sum = 0.0
        for number, batch in enumerate(batches):
            self._observer.check()
            # Dropout follows from seed, step and pass alone, so a resumed run draws the same.
            torch.manual_seed(_pass_seed(self._seed, step, number))
            loss = summed_loss(self.model, batch)
            loss_sum += loss.item()
            (loss / num_supervised).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._spec.max_grad_norm).item()
        self.state.trained_tokens += num_tokens
        is_finite = math.isfinite(loss_sum) and math.isfinite(norm)
        if is_finite:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if not is_finite:
            return None
        epoch = (step + 1) / self.plan.steps_per_epoch
        return StepFigures(step + 1, epoch, loss_sum / num_supervised, rate, norm, num_tokens)

    def _count_bad_step(self) -> None:
        self.state.bad_steps += 1
        self._observer.skipped(self.state.step, self.state.bad_steps)
        if self.state.bad_steps >= BAD_STEPS_LIMIT:
            raise FailedPrecondition(
                "diverged",
                f"the loss or its gradient was not finite in {BAD_STEPS_LIMIT} steps in a row, up to step"
                f" {self.state.step}; lower learning_rate or max_grad_norm",
                final=True,
            )

    def _validate(self) -> None:
        """Add loss and accuracy on held-out rows to the last step's figures."""
        if not self._validation_rows or not self.state.figures:
            return
        scores = measure(self.model, self._validation_rows, self._spec.batch_size, check=self._observer.check)
        last = self.state.figures[-1]
        self.state.figures[-1] = StepFigures(
            last.step,
            last.epoch,
            last.loss,
            last.learning_rate,
            last.gradient_norm,
            last.tokens,
            valid_loss=scores.loss,
            valid_accuracy=scores.accuracy,
        )

    def _progress(self, figures: StepFigures) -> Progress:
        tokens, seconds = (sum(column) for column in zip(*self._pace, strict=True))
        steps_left = self.plan.total_steps - figures.step
        return Progress(
            step=figures.step,
            total_steps=self.plan.total_steps,
            loss=figures.loss,
            learning_rate=figures.learning_rate,
            gradient_norm=figures.gradient_norm,
            tokens_per_second=tokens / seconds,
            eta_seconds=steps_left * seconds / len(self._pace),
            peak_memory_bytes=peak_memory_bytes(self.model.device),
            epoch=figures.epoch,
        )


def _pass_seed(seed: int, step: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed}/{step}/{number}".encode("ascii")).digest()
    return int.from_bytes(digest[:7], "big")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: of the device on CUDA, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
