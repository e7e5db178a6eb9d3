"""Every method trains on a 4-bit base, and PEFT makes of what is published what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn

from services.common.adapter_format import read_folder
from services.common.base_loading import load_base_model
from services.common.errors import InvalidArgument
from services.trainer.methods import METHODS, can_join, methods_page
from services.trainer.optimizers import check_optimizer
from services.trainer.spec import Optimizer
from services.trainer.training.base import BaseFolder, Part, SharedBase
from services.trainer.training.batches import flatten
from services.trainer.training.checkpoint import read_weights
from services.trainer.training.directions import distribute
from services.trainer.training.export import export, relative_error
from services.trainer.training.forms import Pair
from services.trainer.training.initialise import new_adapter
from services.trainer.training.weights import base_weight
from tests.support.models import load_peft_adapters, wrap_with_peft
from tests.support.training import SEED, Observer, load_shared, new_run, task_rows, tiny_spec, train_alone

OFFERED = [method.name for method in METHODS.values() if method.offered]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(nf4_base: BaseFolder) -> SharedBase:
    return load_shared(nf4_base)


@pytest.mark.parametrize("method", OFFERED)
def test_published_files_compute_what_was_trained(
    base: SharedBase, nf4_base: BaseFolder, tmp_path: Path, method: str
) -> None:
    observer = Observer(tmp_path / "run")
    # VeRA trains two vectors a layer, and wants more of everything.
    rate, rank = (0.1, 32) if method == "vera" else (0.01, 4)
    spec = tiny_spec(nf4_base, method=method, learning_rate=rate, rank=rank, n_epochs=3)
    run = new_run(base, spec, observer)
    before = {name: base_weight(linear).clone() for name, linear in base.linears.items()}
    train_alone(run)
    assert observer.progress[-1].loss < 0.8 * observer.progress[0].loss
    error = run.model.save(tmp_path / "adapter", "tiny")
    assert error < 1e-6
    assert all(torch.equal(base_weight(linear), before[name]) for name, linear in base.linears.items())

    summary = read_folder(tmp_path / "adapter")
    assert summary.kind.value == METHODS[method].served_as
    mean_rank = sum(module.rank for module in summary.modules) / len(summary.modules)
    assert mean_rank == METHODS[method].served_rank_factor * rank
    plain = load_base_model(nf4_base.path, nf4_base.quantization, device=CPU, attention="sdpa")
    peft = load_peft_adapters(plain, {"a": tmp_path / "adapter"})
    for row in task_rows(4):
        with torch.no_grad():
            theirs = peft(input_ids=torch.tensor([row.ids])).logits[0]
        batch = flatten([row])
        ours = run.model.counted_logits(batch)
        with run.model.base_only():
            without = run.model.counted_logits(batch)
        assert float((theirs[batch.counted] - ours).abs().max()) < 1e-4
        assert float((ours - without).abs().max()) > 0.1


@pytest.mark.parametrize("method", [name for name in OFFERED if name != "kasa"])
def test_training_begins_at_the_base(base: SharedBase, nf4_base: BaseFolder, method: str) -> None:
    run = new_run(base, tiny_spec(nf4_base, method=method), Observer(Path()))
    batch = flatten(task_rows(3))
    with run.model.base_only():
        without = run.model.counted_logits(batch)
    assert float((run.model.counted_logits(batch) - without).abs().max()) < 1e-4


def test_kasa_begins_without_the_smallest_components(base: SharedBase, nf4_base: BaseFolder) -> None:
    run = new_run(base, tiny_spec(nf4_base, method="kasa"), Observer(Path()))
    name, form = next(iter(run.model.adapter.forms.items()))
    weight = base_weight(base.linears[name])
    changed = weight.clone()
    for pair in form.pairs():
        changed.addmm_(pair.b.detach(), pair.a.detach(), alpha=pair.scale)
    values, left = torch.linalg.svdvals(weight), torch.linalg.svdvals(changed)
    assert torch.allclose(left[:-4], values[:-4], rtol=1e-4, atol=1e-5)
    assert float(left[-4:].abs().max()) < 1e-4
    assert run.model.adapter.penalty() is not None


@pytest.mark.parametrize(("method", "init"), [("pissa", "pissa"), ("olora", "olora")])
def test_start_is_that_of_peft(full_base: BaseFolder, tmp_path: Path, method: str, init: str) -> None:
    """On a full-precision base, PEFT takes the part out of its weights; the first step must be the same."""
    spec = tiny_spec(full_base, method=method, n_epochs=1, batch_size=20)
    run = new_run(load_shared(full_base), spec, Observer(tmp_path), validation_rows=[])
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.target_modules),
        init_lora_weights=init,
        task_type="CAUSAL_LM",
    )
    peft = wrap_with_peft(
        load_base_model(full_base.path, full_base.quantization, device=CPU, attention="sdpa"), config
    )
    for name, form in run.model.adapter.forms.items():
        layer = peft.get_submodule(f"base_model.model.{name}")
        theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        ours = form.parameters["b"] @ form.parameters["a"]
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_dora_step_is_that_of_peft(full_base: BaseFolder, tmp_path: Path) -> None:
    base = load_shared(full_base)
    spec = tiny_spec(full_base, method="dora")
    run = new_run(base, spec, Observer(tmp_path))
    adapter = run.model.adapter
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    run.model.save(tmp_path / "adapter", "tiny")
    plain = load_base_model(full_base.path, full_base.quantization, device=CPU, attention="sdpa")
    peft = load_peft_adapters(plain, {"a": tmp_path / "adapter"})
    row = task_rows(1)[0]
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora" in name)
    wanted = torch.tensor(row.ids[1:])
    nn.functional.cross_entropy(peft(input_ids=torch.tensor([row.ids])).logits[0, :-1], wanted).backward()  # type: ignore[no-untyped-call]
    theirs = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}

    everything = type(row)(row.ids, (False, *[True] * (len(row.ids) - 1)), row.prompt_length, row.source)
    batch = flatten([everything])
    with base.adapting([Part(adapter, 0, batch.num_tokens)]):
        nn.functional.cross_entropy(base.counted_logits(batch), batch.targets).backward()  # type: ignore[no-untyped-call]
    names = {"a": "lora_A.a.weight", "b": "lora_B.a.weight", "magnitude": "lora_magnitude_vector.a.weight"}
    for full_name, parameter in adapter.parameters().items():
        name, _, part = full_name.rpartition(".")
        gradient = theirs[f"base_model.model.{name}.{names[part]}"]
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-5), full_name


def test_plus_teaches_b_faster(base: SharedBase, nf4_base: BaseFolder, tmp_path: Path) -> None:
    """AdamW's first step moves every weight by its rate."""
    spec = tiny_spec(
        nf4_base, method="lora+", lora_plus_ratio=8.0, learning_rate=1e-3, n_epochs=1, batch_size=20
    )
    run = new_run(base, spec, Observer(tmp_path), validation_rows=[])
    before = {name: p.detach().clone() for name, p in run.model.adapter.parameters().items()}
    train_alone(run)
    moved = {
        name: float((p.detach() - before[name]).abs().max())
        for name, p in run.model.adapter.parameters().items()
    }
    b = [step for name, step in moved.items() if name.endswith(".b")]
    assert run.state.step == 1
    rate = run.state.figures[0].learning_rate
    assert b == pytest.approx([8 * rate] * len(b), rel=0.01)


def test_eva_gives_ranks_where_inputs_vary() -> None:
    shares = {
        "wide": torch.tensor([0.3, 0.25, 0.2, 0.15]),
        "narrow": torch.tensor([0.98, 0.01, 0.005, 0.001]),
    }
    assert distribute(shares, 2) == {"wide": 3, "narrow": 1}


def test_eva_directions_are_those_of_the_inputs(
    base: SharedBase, nf4_base: BaseFolder, tmp_path: Path
) -> None:
    rows = task_rows(20)
    run = new_run(base, tiny_spec(nf4_base, method="eva"), Observer(tmp_path), rows=rows)
    name = "model.layers.1.mlp.down_proj"
    seen = []
    with (
        base.recording(lambda each, inputs: seen.append(inputs[0]) if each == name else None),
        torch.no_grad(),
    ):
        for row in rows:
            base.counted_logits(flatten([row]))
    a = run.model.adapter.forms[name].parameters["a"].detach()
    _, _, directions = torch.linalg.svd(torch.cat(seen), full_matrices=False)
    # Signs are free; the sketch keeps twice the mean rank, so small directions may differ a little.
    assert float((a[0] @ directions[0]).abs()) > 0.999
    assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-4)


def test_relative_error_is_that_of_the_full_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 9, generator=generator), torch.randn(7, 3, generator=generator)
    other = b + 0.01 * torch.randn(7, 3, generator=generator)
    expected = float(torch.linalg.norm(0.5 * (b - other) @ a) / torch.linalg.norm(0.5 * b @ a))
    assert relative_error([Pair(a, b, 0.5)], [Pair(a, other, 0.5)]) == pytest.approx(expected, rel=1e-4)
    assert relative_error([Pair(a, torch.zeros_like(b), 0.5)], []) == 0.0


def test_rank_beyond_the_base_is_refused(base: SharedBase, nf4_base: BaseFolder) -> None:
    with pytest.raises(InvalidArgument) as caught:
        new_run(base, tiny_spec(nf4_base, method="pissa", rank=64), Observer(Path()))
    assert (caught.value.reason, caught.value.field, caught.value.limit) == (
        "bad_hyperparameter",
        "spec.rank",
        "32",
    )


def test_method_that_is_not_offered_says_why(nf4_base: BaseFolder) -> None:
    with pytest.raises(InvalidArgument) as caught:
        tiny_spec(nf4_base, method="oft")
    assert caught.value.reason == "unsupported_method"
    assert "full rank" in caught.value.message


def test_alpha_is_refused_where_it_would_do_nothing(nf4_base: BaseFolder) -> None:
    with pytest.raises(InvalidArgument) as caught:
        tiny_spec(nf4_base, method="vera", alpha=3.0)
    assert [violation.field for violation in caught.value.violations] == ["spec.alpha"]
    assert tiny_spec(nf4_base, method="vera").alpha == 4.0


def test_paged_optimizer_needs_cuda() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_optimizer(Optimizer.PAGED_ADAMW_8BIT, "cpu")
    assert caught.value.reason == "unsupported_optimizer"
    check_optimizer(Optimizer.PAGED_ADAMW_8BIT, "cuda")
    check_optimizer(Optimizer.ADAMW_8BIT, "cpu")


def test_jobs_join_where_they_want_to(nf4_base: BaseFolder) -> None:
    assert can_join(tiny_spec(nf4_base))
    assert not can_join(tiny_spec(nf4_base, joint=False))


def test_page_is_the_one_in_docs() -> None:
    page = Path(__file__).parents[3] / "docs" / "methods.md"
    assert page.read_text(encoding="utf-8") == methods_page()


def test_configuration_holds_nothing_of_this_machine(
    base: SharedBase, nf4_base: BaseFolder, tmp_path: Path
) -> None:
    run = new_run(base, tiny_spec(nf4_base), Observer(tmp_path))
    run.model.save(tmp_path / "adapter", "tiny")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert str(tmp_path) not in json.dumps(config)


@pytest.mark.parametrize("method", ["lora", "eva", "dora", "pissa", "kasa", "vera"])
def test_checkpoint_alone_gives_the_published_files(
    base: SharedBase, nf4_base: BaseFolder, tmp_path: Path, method: str
) -> None:
    spec = tiny_spec(nf4_base, method=method, n_epochs=1)
    run = new_run(base, spec, Observer(tmp_path / "run"), validation_rows=[])
    train_alone(run)
    run.model.save(tmp_path / "adapter", "tiny")
    adapter = new_adapter(base, spec, seed=SEED)
    read_weights(tmp_path / "run" / f"step-{run.state.step}", adapter)
    export(adapter, spec, tmp_path / "again", "tiny")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()
