"""The training loop on a tiny base: steps cut in any way, resumed exactly, stopped when they diverge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional

from services.common.base_loading import load_base_model
from services.common.errors import DataLoss, FailedPrecondition
from services.common.fingerprint import ComputeDtype, Quantization
from services.common.store import DirectoryStore
from services.trainer.checkpoint_store import MANIFEST, STATE, WEIGHTS, CheckpointStore
from services.trainer.spec import Schedule
from services.trainer.tokens import TokenRow
from services.trainer.training import together
from services.trainer.training.base import BaseFolder, SharedBase
from services.trainer.training.batches import flatten
from services.trainer.training.loss import token_losses
from services.trainer.training.validation import measure
from tests.support.models import wrap_with_peft
from tests.support.training import (
    Observer,
    StopRun,
    greatest_difference,
    load_shared,
    new_run,
    relative_difference,
    task_rows,
    tiny_spec,
    train_alone,
    weights_of,
)


@pytest.fixture(scope="module")
def nf4(nf4_base: BaseFolder) -> SharedBase:
    return load_shared(nf4_base)


@pytest.fixture(scope="module")
def full(full_base: BaseFolder) -> SharedBase:
    return load_shared(full_base)


def test_loss_falls_on_nf4_and_is_told(nf4: SharedBase, nf4_base: BaseFolder, tmp_path: Path) -> None:
    observer = Observer(tmp_path)
    run = new_run(nf4, tiny_spec(nf4_base, n_epochs=6), observer)
    train_alone(run)

    total = run.plan.total_steps
    assert [progress.step for progress in observer.progress] == list(range(1, total + 1))
    assert observer.progress[-1].loss < 0.3 * observer.progress[0].loss
    assert observer.progress[-1].eta_seconds == 0
    assert observer.progress[0].tokens_per_second > 0
    assert observer.progress[-1].peak_memory_bytes > 1_000_000
    assert run.state.trained_tokens == 6 * sum(len(row.ids) for row in task_rows())
    assert run.state.train_seconds > 0
    assert [row.step for row in run.state.figures if row.valid_loss is not None] == [
        step for step in range(1, total + 1) if step % 3 == 0 or step == total
    ]


def test_sixteen_bit_base_trains_float32_weights(base_path: Path, tmp_path: Path) -> None:
    folder = BaseFolder("tiny-llama", base_path, Quantization.nf4(ComputeDtype.BFLOAT16))
    observer = Observer(tmp_path)
    run = new_run(load_shared(folder), tiny_spec(folder, n_epochs=6, dropout=0.1), observer)
    train_alone(run)
    assert {value.dtype for value in weights_of(run).values()} == {torch.float32}
    assert run.model.model.dtype == torch.bfloat16
    assert observer.progress[-1].loss < 0.3 * observer.progress[0].loss


def test_eight_passes_of_one_row_equal_one_pass_of_eight(
    full: SharedBase, full_base: BaseFolder, tmp_path: Path
) -> None:
    """The last step of an epoch has four rows, so a loss averaged by passes would differ."""
    results = []
    for batch_size, accumulation in [(8, 1), (1, 8)]:
        observer = Observer(tmp_path / str(batch_size))
        spec = tiny_spec(full_base, batch_size=batch_size, gradient_accumulation_steps=accumulation)
        run = new_run(full, spec, observer)
        train_alone(run)
        results.append((weights_of(run), [progress.loss for progress in observer.progress]))
    (one, one_losses), (eight, eight_losses) = results
    assert one_losses == pytest.approx(eight_losses, rel=1e-5)
    assert greatest_difference(one, eight) < 1e-4
    assert greatest_difference(one, {name: torch.zeros_like(value) for name, value in one.items()}) > 0.05


def test_packed_loss_is_the_sum_of_single_losses(full: SharedBase, full_base: BaseFolder) -> None:
    run = new_run(full, tiny_spec(full_base), Observer(Path()))
    rows = task_rows(9)
    single = [_loss(run.model.counted_logits(flatten([row])), [row]) for row in rows]
    packed = _loss(run.model.counted_logits(flatten(rows)), rows)
    assert packed == pytest.approx(sum(single), rel=1e-6)


def _loss(logits: torch.Tensor, rows: list[TokenRow]) -> float:
    return float(token_losses(logits, flatten(rows).targets).sum())


def test_packing_trains_on_the_same_tokens_in_fewer_steps(
    full: SharedBase, full_base: BaseFolder, tmp_path: Path
) -> None:
    observer = Observer(tmp_path)
    run = new_run(full, tiny_spec(full_base, packing=True, batch_size=1, n_epochs=4), observer)
    train_alone(run)
    assert run.state.trained_tokens == 4 * sum(len(row.ids) for row in task_rows())
    assert run.plan.steps_per_epoch < 10
    assert observer.progress[-1].loss < 0.5 * observer.progress[0].loss


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_run_ends_with_the_same_bits(
    nf4: SharedBase, nf4_base: BaseFolder, tmp_path: Path, dropout: float, optimizer: str
) -> None:
    # The rank makes some moments large enough for eight bits.
    spec = tiny_spec(nf4_base, dropout=dropout, optimizer=optimizer, rank=64)
    through = new_run(nf4, spec, Observer(tmp_path / "through"))
    train_alone(through)

    broken_off = new_run(nf4, spec, Observer(tmp_path / "broken", stop_before=5))
    with pytest.raises(StopRun):
        train_alone(broken_off)
    resumed = new_run(nf4, spec, Observer(tmp_path / "resumed"))
    resumed.resume(tmp_path / "broken" / "step-3")
    assert resumed.state.step == 3
    train_alone(resumed)

    assert greatest_difference(weights_of(through), weights_of(resumed)) == 0.0
    assert resumed.state.trained_tokens == through.state.trained_tokens
    assert resumed.state.figures == through.state.figures


def test_dropout_changes_the_run(nf4: SharedBase, nf4_base: BaseFolder, tmp_path: Path) -> None:
    runs = [
        new_run(nf4, tiny_spec(nf4_base, dropout=dropout), Observer(tmp_path / str(dropout)))
        for dropout in (0.0, 0.3)
    ]
    for run in runs:
        train_alone(run)
    assert greatest_difference(weights_of(runs[0]), weights_of(runs[1])) > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_activations_change_nothing(
    nf4: SharedBase, nf4_base: BaseFolder, tmp_path: Path, dropout: float
) -> None:
    plain = new_run(nf4, tiny_spec(nf4_base, dropout=dropout), Observer(tmp_path / "plain"))
    train_alone(plain)
    spec = tiny_spec(nf4_base, dropout=dropout, gradient_checkpointing=True)
    checkpointed = new_run(load_shared(nf4_base), spec, Observer(tmp_path / "checkpointed"))
    assert checkpointed.model.model.is_activation_checkpointing
    train_alone(checkpointed)
    assert greatest_difference(weights_of(plain), weights_of(checkpointed)) == 0.0


def test_same_seed_same_adapter_file(full: SharedBase, full_base: BaseFolder, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run = new_run(full, tiny_spec(full_base, n_epochs=1), Observer(tmp_path / f"run-{name}"))
        train_alone(run)
        run.model.save(tmp_path / name, "tiny")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_run_is_that_of_peft_and_torch(nf4: SharedBase, nf4_base: BaseFolder, tmp_path: Path) -> None:
    """Against PEFT's own LoRA layers and a plain loop, from the same first weights."""
    spec = tiny_spec(nf4_base, batch_size=4, n_epochs=1, schedule=Schedule.CONSTANT, warmup_ratio=0.0)
    run = new_run(nf4, spec, Observer(tmp_path))
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.target_modules),
        task_type="CAUSAL_LM",
    )
    base = load_base_model(
        nf4_base.path, nf4_base.quantization, device=torch.device("cpu"), attention="eager"
    )
    peft = wrap_with_peft(base, config)
    theirs = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    pairs = {
        ours: theirs[f"base_model.model.{ours[:-2]}.lora_{ours[-1].upper()}.default.weight"]
        for ours in run.model.adapter.parameters()
    }
    with torch.no_grad():
        for ours, parameter in pairs.items():
            parameter.copy_(run.model.adapter.parameters()[ours])
    optimizer = torch.optim.AdamW(theirs.values(), lr=spec.learning_rate, weight_decay=0.0)
    for step in run.plan.epoch(0):
        loss = torch.zeros(())
        count = 0
        for row in (run.plan.rows[index] for each in step for index in each):
            logits = peft(input_ids=torch.tensor([row.ids])).logits[0, :-1]
            wanted = torch.tensor(row.ids[1:])
            counts = torch.tensor(row.supervised[1:])
            loss = loss + functional.cross_entropy(logits[counts], wanted[counts], reduction="sum")
            count += int(counts.sum())
        (loss / count).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(theirs.values(), spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    train_alone(run)
    trained = {ours: parameter.detach() for ours, parameter in pairs.items()}
    assert relative_difference(weights_of(run), trained) < 1e-4


def test_row_62_divergence_ends_the_run(full_base: BaseFolder, tmp_path: Path) -> None:
    observer = Observer(tmp_path)
    base = load_shared(full_base)
    run = new_run(base, tiny_spec(full_base), observer)
    before = weights_of(run)
    with torch.no_grad():
        base.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FailedPrecondition) as caught:
        train_alone(run)
    assert caught.value.reason == "diverged"
    assert observer.skipped_steps == [1, 2, 3]
    assert observer.progress == []
    assert greatest_difference(before, weights_of(run)) == 0.0


def test_one_bad_step_is_left_out(
    full: SharedBase, full_base: BaseFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Observer(tmp_path)
    run = new_run(full, tiny_spec(full_base), observer)
    calls = iter(range(1000))

    def sometimes_nan(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_losses(logits, targets) * (float("nan") if next(calls) == 2 else 1.0)

    monkeypatch.setattr(together, "token_losses", sometimes_nan)
    train_alone(run)
    assert observer.skipped_steps == [3]
    assert [row.step for row in run.state.figures] == [step for step in range(1, 11) if step != 3]
    assert all(torch.isfinite(value).all() for value in weights_of(run).values())


def test_loss_is_that_of_the_supervised_tokens_alone(full: SharedBase, full_base: BaseFolder) -> None:
    """Against the plain definition, row by row."""
    run = new_run(full, tiny_spec(full_base), Observer(Path()))
    data = task_rows(5)
    expected = 0.0
    for row in data:
        ids = torch.tensor([row.ids])
        logits = run.model.logits(ids, torch.ones_like(ids), torch.arange(len(row.ids)))[0].log_softmax(-1)
        expected -= sum(
            float(logits[position - 1, token])
            for position, (token, counts) in enumerate(zip(row.ids, row.supervised, strict=True))
            if counts
        )
    assert _loss(run.model.counted_logits(flatten(data)), data) == pytest.approx(expected, rel=1e-5)
    scores = measure(run.model, data, 2, check=lambda: None)
    assert scores.loss_sums.sum() == pytest.approx(expected, rel=1e-5)
    assert scores.counts.tolist() == [3.0] * 5


@pytest.mark.parametrize("method", ["lora", "pissa", "kasa"])
def test_checkpoint_comes_back_from_the_store(
    full: SharedBase, full_base: BaseFolder, tmp_path: Path, method: str
) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.ready()
    checkpoints = CheckpointStore(store, "jobs/j/checkpoints")
    spec = tiny_spec(full_base, n_epochs=1, method=method, early_stopping_patience=1, checkpoint_steps=2)
    run = new_run(full, spec, Observer(tmp_path / "run"))
    train_alone(run)
    run.write(tmp_path / "written")
    digest = checkpoints.save(tmp_path / "written", "ck")
    checkpoints.load("ck", digest, tmp_path / "loaded")
    again = new_run(full, spec, Observer(tmp_path / "again"), seed=99)
    again.resume(tmp_path / "loaded")
    assert greatest_difference(weights_of(run), weights_of(again)) == 0.0
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
    tmp_path: Path, damage: Callable[[DirectoryStore, str], None], name: str
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
