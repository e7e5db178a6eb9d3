"""One job's training, step by step: a step follows from seed, number and weights alone."""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from services.trainer.figures import CHECKPOINT_VALIDATION_ROWS, StepFigures
from services.trainer.job import Progress
from services.trainer.spec import TrainingSpec
from services.trainer.tokens import TokenRow
from services.trainer.training.batches import BatchPlan, Bin, FlatBatch
from services.trainer.training.checkpoint import RunState, load_weights, read_run, write_run
from services.trainer.training.guards import check_finite, check_growth, improves, spent_budget
from services.trainer.training.model import AdapterModel
from services.trainer.training.optimizers import new_optimizer, set_rate
from services.trainer.training.schedule import learning_rate
from services.trainer.training.validation import measure

RATE_WINDOW_STEPS = 10


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

    def stopped_early(self, step: int, best_valid_loss: float) -> None:
        """Take note that the validation loss no longer falls, and that the run ends at its best weights."""
        ...


class TrainingRun:
    """One job's training from its first step, or from a checkpoint, to its last.

    Whoever drives it calls `next_pass`, runs the batch forward and backward, and calls `finish_pass`, until
    `is_done`.
    """

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
        self._parameters = model.adapter.parameters()
        self._optimizer = new_optimizer(model.adapter, spec)
        self._best: dict[str, torch.Tensor] | None = None
        self._pace: deque[tuple[int, float]] = deque(maxlen=RATE_WINDOW_STEPS)
        self._epoch_order: tuple[int, list[list[Bin]]] = (-1, [])
        self._passes: deque[FlatBatch] = deque()
        self._pass_number = 0
        self._loss_sum = 0.0
        self._num_tokens = 0
        self._num_counted = 0
        self._step_started = 0.0

    def resume(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`; raise `DataLoss` (`corrupt_checkpoint`) if it cannot be."""
        self.state, self._best = read_run(folder, self.model.adapter, self._optimizer)
        if self.is_done:
            self._take_best()

    def write(self, folder: Path) -> None:
        """Write all that `resume` needs to `folder`."""
        write_run(folder, self.model.adapter, self._optimizer, self.state, self._best)

    @property
    def is_done(self) -> bool:
        """Whether no step is left."""
        return self.state.is_stopped or self.state.step >= self.plan.total_steps

    @property
    def loss_weight(self) -> float:
        """What a summed loss is multiplied by: each counted token of a step weighs the same, however cut."""
        return 1.0 / self._num_counted

    def next_pass(self) -> FlatBatch:
        """Return the rows of the next forward pass; between steps the observer is asked first."""
        assert not self.is_done, "there is a step left"
        if not self._passes:
            self._begin_step()
        self._observer.check()
        # Dropout follows from seed, step and pass alone, so a resumed run draws the same.
        self.model.adapter.begin_pass(_pass_seed(self._seed, self.state.step, self._pass_number))
        return self._passes[0]

    def finish_pass(self, loss_sum: float) -> None:
        """Take note that the gradients of a pass are there; after the last pass of a step, take the step.

        Args:
            loss_sum: the pass's summed loss in nats.

        Raises:
            FailedPrecondition: `diverged` or `budget_exceeded`.
        """
        self.model.adapter.end_pass()
        self._loss_sum += loss_sum
        self._passes.popleft()
        self._pass_number += 1
        if not self._passes:
            self._finish_step()

    def _begin_step(self) -> None:
        self._observer.between_steps(self)
        self._step_started = time.monotonic()
        epoch, position = divmod(self.state.step, self.plan.steps_per_epoch)
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, self.plan.epoch(epoch))
        self._passes.extend(self.plan.passes(self._epoch_order[1][position]))
        self._pass_number = 0
        self._loss_sum = 0.0
        self._num_counted = sum(batch.num_counted for batch in self._passes)
        self._num_tokens = sum(batch.num_tokens for batch in self._passes)

    def _finish_step(self) -> None:
        figures = self._update()
        seconds = time.monotonic() - self._step_started
        self.state.step += 1
        self.state.trained_tokens += self._num_tokens
        self.state.train_seconds += seconds
        if figures is None:
            self.state.bad_steps += 1
            self._observer.skipped(self.state.step, self.state.bad_steps)
            check_finite(self.state)
        else:
            self.state.bad_steps = 0
            self.state.figures.append(figures)
            self._pace.append((self._num_tokens, seconds))
            self._observer.stepped(self._progress(figures))
            check_growth(self.state.figures)
        self._keep()
        if self.is_done:
            self._take_best()

    def _update(self) -> StepFigures | None:
        """Take an optimizer step by the gradients that are there; None where they are not finite."""
        step = self.state.step
        rate = learning_rate(
            step,
            total_steps=self.plan.total_steps,
            peak=self._spec.learning_rate,
            warmup_ratio=self._spec.warmup_ratio,
            schedule=self._spec.schedule,
        )
        penalty = self.model.adapter.penalty()
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._spec.max_grad_norm).item()
        is_finite = math.isfinite(self._loss_sum) and math.isfinite(norm)
        if is_finite:
            set_rate(self._optimizer, rate)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if not is_finite:
            return None
        epoch = (step + 1) / self.plan.steps_per_epoch
        return StepFigures(step + 1, epoch, self._loss_sum / self._num_counted, rate, norm, self._num_tokens)

    def _keep(self) -> None:
        """Validate and write a checkpoint where one is due, also where a spent budget ends the run."""
        spent = None if self.is_done else spent_budget(self.state, self._spec)
        if spent is not None or self.is_done or self.state.step % self._spec.checkpoint_steps == 0:
            self._validate()
            self._observer.checkpoint(self)
        if spent is not None:
            raise spent

    def _validate(self) -> None:
        """Add loss and accuracy on held-out rows to the last step's figures, and see whether they improve."""
        if not self._validation_rows or not self.state.figures:
            return
        scores = measure(self.model, self._validation_rows, self._spec.batch_size, check=self._observer.check)
        self.state.figures[-1] = replace(
            self.state.figures[-1], valid_loss=scores.loss, valid_accuracy=scores.accuracy
        )
        if not self._spec.early_stopping_patience:
            return
        if improves(scores.loss, self.state.best_valid_loss):
            self.state.best_valid_loss = scores.loss
            self.state.stale_validations = 0
            self._best = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            return
        self.state.stale_validations += 1
        if self.state.stale_validations >= self._spec.early_stopping_patience and not self.is_done:
            self.state.is_stopped = True
            assert self.state.best_valid_loss is not None, "something was better"
            self._observer.stopped_early(self.state.step, self.state.best_valid_loss)

    def _take_best(self) -> None:
        if self._best is not None:
            load_weights(self._parameters, self._best)

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
    """Return 40 bits that follow from the three numbers."""
    digest = hashlib.sha256(f"{seed}/{step}/{number}".encode("ascii")).digest()
    return int.from_bytes(digest[:5], "big")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: of the device on CUDA, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
