"""Rows, an observer and runs on a tiny base, for tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from services.common.fingerprint import linear_module_table
from services.trainer.dataset import PromptRow
from services.trainer.job import Progress
from services.trainer.spec import TrainingSpec, resolve_spec
from services.trainer.tokens import TokenRow
from services.trainer.training.base import BaseFolder, SharedBase
from services.trainer.training.batches import BatchPlan
from services.trainer.training.checkpoint import RunState
from services.trainer.training.initialise import new_adapter
from services.trainer.training.loop import TrainingRun
from services.trainer.training.model import AdapterModel
from services.trainer.training.together import shared_pass

SEED = 11
PAD_ID = 1


class StopRun(Exception):  # noqa: N818 - not a failure
    """Ends a run from its observer."""


class Observer:
    """Notes what a run reports, keeps its checkpoints in `folder`, and may end it before a given step."""

    def __init__(self, folder: Path, *, stop_before: int | None = None) -> None:
        self.folder = folder
        self.stop_before = stop_before
        self.progress: list[Progress] = []
        self.skipped_steps: list[int] = []
        self.stopped: list[tuple[int, float]] = []
        self.checkpoints: list[int] = []
        self.states: dict[int, RunState] = {}

    def check(self) -> None:
        """Never ends the run."""

    def between_steps(self, run: TrainingRun) -> None:
        if run.state.step == self.stop_before:
            raise StopRun

    def stepped(self, progress: Progress) -> None:
        self.progress.append(progress)

    def skipped(self, step: int, bad_steps: int) -> None:
        self.skipped_steps.append(step)

    def stopped_early(self, step: int, best_valid_loss: float) -> None:
        self.stopped.append((step, best_valid_loss))

    def checkpoint(self, run: TrainingRun) -> None:
        self.checkpoints.append(run.state.step)
        run.write(self.folder / f"step-{run.state.step}")


def task_rows(count: int = 20, *, offset: int = 0) -> list[TokenRow]:
    """Rows of different length, whose last tokens follow from their first; another offset is another task."""
    made = []
    for index in range(count):
        digit = index % 4
        prompt = [50 + digit] * (2 + index % 5)
        ids = (*prompt, 70 + (digit + offset) % 4, 80 + (digit + offset) % 4, 0)
        mask = (*[False] * len(prompt), True, True, True)
        made.append(TokenRow(ids, mask, len(prompt), PromptRow(index + 1, str(index), "c")))
    return made


def tiny_spec(folder: BaseFolder, **fields: object) -> TrainingSpec:
    """Return a specification of a short run with a high rate."""
    given = {"rank": 4, "learning_rate": 0.01, "n_epochs": 2, "checkpoint_steps": 3, "max_seq_len": 32}
    modules = list(linear_module_table(folder.path))
    return resolve_spec(given | fields, max_model_len=512, module_names=modules)


def load_shared(folder: BaseFolder) -> SharedBase:
    """Return the base on the CPU."""
    return SharedBase.load(folder, torch.device("cpu"))


def new_run(
    base: SharedBase,
    spec: TrainingSpec,
    observer: Observer,
    *,
    rows: Sequence[TokenRow] | None = None,
    validation_rows: Sequence[TokenRow] | None = None,
    seed: int = SEED,
) -> TrainingRun:
    """Return a run on `base`, as a job's pipeline makes it."""
    data = task_rows() if rows is None else rows
    held_out = task_rows(4) if validation_rows is None else validation_rows
    if spec.gradient_checkpointing:
        base.checkpoint_activations()
    plan = BatchPlan(
        data,
        spec.batch_size,
        spec.gradient_accumulation_steps,
        spec.n_epochs,
        seed,
        packed_tokens=spec.max_seq_len if spec.packing else 0,
        group_by_length=spec.group_by_length,
    )
    model = AdapterModel(base, new_adapter(base, spec, seed=seed, rows=data), spec, PAD_ID)
    return TrainingRun(model, plan, spec, observer, seed=seed, validation_rows=held_out)


def weights_of(run: TrainingRun) -> dict[str, torch.Tensor]:
    """Return a copy of what is trained."""
    return {name: p.detach().clone() for name, p in run.model.adapter.parameters().items()}


def greatest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference of two sets of tensors."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of any tensor over its norm."""
    assert one.keys() == other.keys()
    return max(
        float(torch.linalg.norm(one[name] - other[name]) / torch.linalg.norm(one[name]).clamp_min(1e-12))
        for name in one
    )


def train_alone(run: TrainingRun) -> None:
    """Take one run to its end; whatever ends it early is raised."""
    while not run.is_done:
        error = shared_pass(run.model.base, [run]).get(run)
        if error is not None:
            raise error
