"""The training loop on a tiny base: steps cut in any way, resumed exactly, stopped when they diverge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from services.common.adapter_format import read_folder
from services.common.errors import DataLoss, FailedPrecondition
from services.common.fingerprint import linear_module_table
from services.common.store import DirectoryStore
from services.trainer.dataset import PromptRow
from services.trainer.job import Progress
from services.trainer.spec import TrainingSpec, resolve_spec
from services.trainer.tokens import TokenRow
from services.trainer.training.batches import BatchPlan, collate
from services.trainer.training.checkpoint import MANIFEST, STATE, WEIGHTS, CheckpointStore, RunState
from services.trainer.training.loop import TrainingRun
from services.trainer.training.loss import counted_logits, summed_loss
from services.trainer.training.model import AdapterModel, BaseFolder, attach_adapter, load_base
from services.trainer.training.validation import measure
from tests.support.models import load_peft_adapters

SEED = 11


class Observer:
    """Notes what a run reports; ends it before a given step."""

    def __init__(self, folder: Path, *, stop_before: int | None = None) -> None:
        self.folder = folder
        self.stop_before = stop_before
        self.progress: list[Progress] = []
        self.skipped_steps: list[int] = []
        self.states: dict[int, RunState] = {}

    def check(self) -> None:
        """Never ends the run."""

    def between_steps(self, run: TrainingRun) -> None:
        if run.state.step == self.stop_before:
            raise KeyboardInterrupt

    def stepped(self, progress: Progress) -> None:
        self.progress.append(progress)

    def skipped(self, step: int, bad_steps: int) -> None:
        self.skipped_steps.append(step)

    def checkpoint(self, run: TrainingRun) -> None:
        run.write(self.folder / f"step-{run.state.step}")


def rows(count: int = 20) -> list[TokenRow]:
    """Rows of different length, whose last tokens follow from their first."""
    made = []
    for index in range(count):
        digit = index % 4
        prompt = [50 + digit] * (2 + index % 5)
        ids = (*prompt, 70 + digit, 80 + digit, 0)
        mask = (*[False] * len(prompt), True, True, True)
        made.append(TokenRow(ids, mask, len(prompt), PromptRow(index + 1, str(index), "c")))
    return made


def specification(base: BaseFolder, **fields: object) -> TrainingSpec:
    given = {"rank": 4, "learning_rate": 0.01, "n_epochs": 2, "checkpoint_steps": 3, "max_seq_len": 32}
    modules = list(linear_module_table(base.path))
    return resolve_spec(given | fields, max_model_len=512, module_names=modules)


def run_of(
    base: BaseFolder, observer: Observer, *, data: Sequence[TokenRow] | None = None, **fields: object
) -> TrainingRun:
    spec = specification(base, **fields)
    model = attach_adapter(load_base(base, torch.device("cpu")), spec, seed=SEED, pad_id=1)
    plan = BatchPlan(data or rows(), spec.batch_size, spec.gradient_accumulation_steps, spec.n_epochs, SEED)
    return TrainingRun(model, plan, spec, observer, seed=SEED, validation_rows=rows(4))


def weights(model: AdapterModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.parameters().items()}


def greatest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_loss_falls_on_nf4_and_is_told(nf4_base: BaseFolder, tmp_path: Path) -> None:
    observer = Observer(tmp_path)
    run = run_of(nf4_base, observer, n_epochs=6)
    state = run.train()

    total = run.plan.total_steps
    assert [progress.step for progress in observer.progress] == list(range(1, total + 1))
    assert observer.progress[-1].loss < 0.3 * observer.progress[0].loss
    assert observer.progress[-1].eta_seconds == 0
    assert observer.progress[0].tokens_per_second > 0
    assert observer.progress[-1].peak_memory_bytes > 1_000_000
    assert state.trained_tokens == 6 * sum(len(row.ids) for row in rows())
    assert [row.step for row in state.figures if row.valid_loss is not None] == [
        step for step in range(1, total + 1) if step % 3 == 0 or step == total
    ]


def test_eight_passes_of_one_row_equal_one_pass_of_eight(full_base: BaseFolder, tmp_path: Path) -> None:
    """The last step of an epoch has four rows, so a loss averaged by passes would differ."""
    results = []
    for batch_size, accumulation in [(8, 1), (1, 8)]:
        observer = Observer(tmp_path / str(batch_size))
        run = run_of(full_base, observer, batch_size=batch_size, gradient_accumulation_steps=accumulation)
        run.train()
        results.append((weights(run.model), [progress.loss for progress in observer.progress]))
    (one, one_losses), (eight, eight_losses) = results
    assert one_losses == pytest.approx(eight_losses, rel=1e-5)
    assert greatest_difference(one, eight) < 1e-4
    assert greatest_difference(one, {name: torch.zeros_like(value) for name, value in one.items()}) > 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_run_ends_with_the_same_bits(nf4_base: BaseFolder, tmp_path: Path, dropout: float) -> None:
    through = run_of(nf4_base, Observer(tmp_path / "through"), dropout=dropout)
    through.train()

    broken_off = run_of(nf4_base, Observer(tmp_path / "broken", stop_before=5), dropout=dropout)
    with pytest.raises(KeyboardInterrupt):
        broken_off.train()
    resumed = run_of(nf4_base, Observer(tmp_path / "resumed"), dropout=dropout)
    resumed.resume(tmp_path / "broken" / "step-3")
    assert resumed.state.step == 3
    resumed.train()

    assert greatest_difference(weights(through.model), weights(resumed.model)) == 0.0
    assert resumed.state.trained_tokens == through.state.trained_tokens
    assert resumed.state.figures == through.state.figures


def test_same_seed_same_adapter_file(full_base: BaseFolder, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run = run_of(full_base, Observer(tmp_path / f"run-{name}"), n_epochs=1)
        run.train()
        run.model.save(tmp_path / name, "tiny")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_divergence_ends_the_run(full_base: BaseFolder, tmp_path: Path) -> None:
    observer = Observer(tmp_path)
    run = run_of(full_base, observer)
    before = weights(run.model)
    poisoned = next(iter(run.model.model.get_input_embeddings().parameters()))
    with torch.no_grad():
        poisoned.fill_(float("nan"))
    with pytest.raises(FailedPrecondition) as caught:
        run.train()
    assert caught.value.reason == "diverged"
    assert observer.skipped_steps == [1, 2, 3]
    assert observer.progress == []
    assert greatest_difference(before, weights(run.model)) == 0.0


def test_one_bad_step_is_left_out(
    full_base: BaseFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Observer(tmp_path)
    run = run_of(full_base, observer)
    calls = iter(range(1000))

    def sometimes_nan(model: AdapterModel, batch: Any) -> torch.Tensor:
        return summed_loss(model, batch) * (float("nan") if next(calls) == 2 else 1.0)

    monkeypatch.setattr("services.trainer.training.loop.summed_loss", sometimes_nan)
    state = run.train()
    assert observer.skipped_steps == [3]
    assert [row.step for row in state.figures] == [step for step in range(1, 11) if step != 3]
    assert all(torch.isfinite(value).all() for value in weights(run.model).values())


def test_loss_is_that_of_the_supervised_tokens_alone(full_base: BaseFolder, tmp_path: Path) -> None:
    """Against the plain definition, row by row, without padding."""
    run = run_of(full_base, Observer(tmp_path))
    data = rows(5)
    expected = 0.0
    for row in data:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            logits = run.model.model(input_ids=ids).logits[0].log_softmax(-1)
        expected -= sum(
            float(logits[position - 1, token])
            for position, (token, counts) in enumerate(zip(row.ids, row.supervised, strict=True))
            if counts
        )
    with torch.no_grad():
        assert float(summed_loss(run.model, collate(data, 1))) == pytest.approx(expected, rel=1e-5)
    assert measure(run.model, data, 2, check=lambda: None).loss_sums.sum() == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize(("method", "targets"), [("lora", ()), ("rslora", ("q_proj", "v_proj"))])
def test_saved_adapter_is_the_trained_one(
    nf4_base: BaseFolder, tmp_path: Path, method: str, targets: tuple[str, ...]
) -> None:
    chosen: dict[str, Any] = {"target_modules": targets} if targets else {}
    run = run_of(nf4_base, Observer(tmp_path / "run"), method=method, n_epochs=1, **chosen)
    run.train()
    run.model.save(tmp_path / "adapter", "tiny")
    read_folder(tmp_path / "adapter")

    batch = collate(rows(6), 1)
    run.model.model.eval()
    with torch.no_grad():
        ours, _ = counted_logits(run.model, batch)
        with run.model.base_only():
            base, _ = counted_logits(run.model, batch)
    loaded: PeftModel = load_peft_adapters(
        load_base(nf4_base, torch.device("cpu")), {"a": tmp_path / "adapter"}
    )
    with torch.no_grad():
        theirs, _ = counted_logits(AdapterModel(loaded, 1), batch)
    assert float((ours - theirs).abs().max()) == 0.0
    assert float((ours - base).abs().max()) > 0.1


def test_checkpoint_comes_back_from_the_store(full_base: BaseFolder, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.ready()
    checkpoints = CheckpointStore(store, "jobs/j/checkpoints")
    run = run_of(full_base, Observer(tmp_path / "run"), n_epochs=1)
    run.train()
    run.write(tmp_path / "written")
    digest = checkpoints.save(tmp_path / "written", "ck")
    checkpoints.load("ck", digest, tmp_path / "loaded")
    again = run_of(full_base, Observer(tmp_path / "again"), n_epochs=1)
    again.resume(tmp_path / "loaded")
    assert greatest_difference(weights(run.model), weights(again.model)) == 0.0
    assert again.state == run.state

    checkpoints.discard(["ck"])
    assert list(store.list("jobs/")) == []


def _truncate(store: DirectoryStore, key: str) -> None:
    store.put(key, store.get(key)[:-1])


def _lose(store: DirectoryStore, key: str) -> None:
    store.delete(key)


@pytest.mark.parametrize("damage", [_truncate, _lose])
@pytest.mark.parametrize("name", [MANIFEST, STATE, WEIGHTS])
def test_damaged_checkpoint_is_refused(
    full_base: BaseFolder, tmp_path: Path, damage: Callable[[DirectoryStore, str], None], name: str
) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.ready()
    checkpoints = CheckpointStore(store, "jobs/j/checkpoints")
    (tmp_path / "files").mkdir()
    for file in (WEIGHTS, STATE):
        (tmp_path / "files" / file).write_bytes(b"some bytes")
    digest = checkpoints.save(tmp_path / "files", "ck")
    damage(store, f"jobs/j/checkpoints/ck/{name}")
    with pytest.raises(DataLoss) as caught:
        checkpoints.load("ck", digest, tmp_path / "loaded")
    assert caught.value.reason == "corrupt_checkpoint"
