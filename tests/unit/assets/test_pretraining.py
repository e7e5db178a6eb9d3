"""Pretraining: the plan, the streams, the checkpoint, and a short run that learns, resumes and exports."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from assets.base_model import base_config, export_base, new_base
from assets.echoes import echo_documents
from assets.pretrain import PretrainingRun, RunSettings, build_optimizers, drop_later_lines
from assets.schedule import DECAY_FROM, STAGES, WARMUP_STEPS, Stage, batch_plan, learning_rate_factor
from assets.streams import CHILDREN, FICTION, BatchReader, load_streams
from assets.tokenizer import train_tokenizer, write_tokenizer
from assets.training_state import RunCounters, load_state, save_state


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _write_corpus(folder: Path) -> None:
    for number, part in enumerate([*CHILDREN, *FICTION]):
        with lzma.open(folder / f"{part}.jsonl.xz", "wt", encoding="utf-8") as lines:
            for chapter in range(60):
                text = f"The fox of part {number} met the crow {chapter} times. " * 12
                lines.write(json.dumps({"text": text}) + "\n")


def _settings(folder: Path, **changes: int | str) -> RunSettings:
    settings: dict[str, object] = {
        "stage": "reading",
        "corpus": folder / "corpus",
        "out": folder / "base",
        "cache": folder / "cache",
        "stop_at_minutes": 60.0,
        "token_budget": 24 * 1024,
        "batch_tokens": 1024,
        "instruction_chats": 200,
        "export_every_minutes": 60.0,
        "optimizer": "muon",
        "muon_rate": 0.02,
        "adam_rate": 0.003,
        "threads": 1,
        "device": "cpu",
        "seed": 1,
    }
    return RunSettings(**{**settings, **changes})  # type: ignore[arg-type]


def test_learning_rate_warms_up_stays_and_ends_at_zero() -> None:
    assert learning_rate_factor(0, 0.0) == pytest.approx(1 / WARMUP_STEPS)
    assert learning_rate_factor(WARMUP_STEPS, 0.1) == 1.0
    assert learning_rate_factor(1000, DECAY_FROM) == 1.0
    assert learning_rate_factor(1000, (1 + DECAY_FROM) / 2) == pytest.approx(0.5)
    assert learning_rate_factor(1000, 1.0) == 0.0


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_every_batch_has_the_same_tokens_and_long_rows_come_last(stage: Stage) -> None:
    plans = [batch_plan(stage, progress / 100, 4096) for progress in range(100)]
    assert {plan.rows * plan.row_tokens for plan in plans} == {4096}
    assert [plan.row_tokens for plan in plans] == sorted(plan.row_tokens for plan in plans)
    assert plans[-1].row_tokens == base_config().max_position_embeddings
    assert all(sum(plan.mix.values()) == pytest.approx(1.0) for plan in plans)
    assert plans[-1].mix["instructions"] > plans[0].mix.get("instructions", 0.0)


def test_reader_goes_on_from_its_cursors() -> None:
    streams = {"a": np.arange(1000, dtype=np.uint16), "b": np.arange(5000, 6000, dtype=np.uint16)}
    mix = {"a": 0.5, "b": 0.5}
    reader = BatchReader(streams, seed=1)
    whole = [reader.read(step, 4, 10, mix) for step in range(6)]
    resumed = BatchReader(streams, seed=1)
    for step in range(3):
        resumed.read(step, 4, 10, mix)
    later = BatchReader(streams, seed=1)
    later.cursors = dict(resumed.cursors)
    assert all((later.read(step, 4, 10, mix) == whole[step]).all() for step in range(3, 6))
    assert {name for batch in whole for name in ("a" if row[0] < 5000 else "b" for row in batch)} == {
        "a",
        "b",
    }


def test_reader_begins_again_where_a_stream_ends() -> None:
    reader = BatchReader({"a": np.arange(25, dtype=np.uint16)}, seed=1)
    rows = reader.read(0, 3, 10, {"a": 1.0})
    assert rows.tolist() == [list(range(10)), list(range(10, 20)), list(range(5, 15))]


def _is_recall(body: list[int]) -> bool:
    """Whether the last twelve pairs of tokens are all among the pairs before."""
    pairs = list(zip(body[::2], body[1::2], strict=False))
    return len(body) % 2 == 0 and 14 <= len(pairs) <= 20 and set(pairs[-12:]) <= set(pairs[:-12])


def test_echoes_say_the_same_span_again() -> None:
    source = np.random.default_rng(1).integers(6, 4096, 5000).astype(np.uint16)
    packed = echo_documents(source, newline_id=204, document_count=200, seed=2)
    documents = np.split(packed, np.flatnonzero(packed == 0) + 1)[:-1]
    assert len(documents) == 200
    recalls = 0
    for document in documents:
        body = document[:-1].tolist()
        if _is_recall(body):
            recalls += 1
            continue
        periods = [n for n in range(4, 42) if len(body) % n == 0 and body == body[:n] * (len(body) // n)]
        assert periods
        assert 2 <= len(body) // periods[0] <= 10
    assert 40 < recalls < 100
    assert (packed == echo_documents(source, newline_id=204, document_count=200, seed=2)).all()


def _tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_checkpoint_restores_weights_and_moments(tmp_path: Path, optimizer: str) -> None:
    settings = _settings(tmp_path, optimizer=optimizer)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))

    def step(model: LlamaForCausalLM, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        loss = cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        for each in optimizers.values():
            each.step()
            each.zero_grad()

    model = _tiny_model(1)
    optimizers = build_optimizers(model, settings)
    step(model, optimizers)
    counters = RunCounters(step=1, tokens=24, elapsed_seconds=2.5, cursors={"a": 24})
    save_state(tmp_path / "state.safetensors", model, optimizers, counters)
    other = _tiny_model(2)
    other_optimizers = build_optimizers(other, settings)
    assert load_state(tmp_path / "state.safetensors", other, other_optimizers) == counters
    step(model, optimizers)
    step(other, other_optimizers)
    for (name, left), right in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_resumed_log_has_no_step_twice(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30)))
    drop_later_lines(log, 20)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [10, 20]


def test_export_loads_with_the_same_outputs_in_bfloat16(tmp_path: Path) -> None:
    model = new_base(seed=3)
    export_base(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(12)[None]
    twin = model.to(torch.bfloat16).to(torch.float32)
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=ids).logits, twin(input_ids=ids).logits)
    assert loaded.generation_config.eos_token_id == 0
    assert not list(tmp_path.glob("*.partial"))


def test_a_short_run_learns_resumes_and_exports(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    _write_corpus(tmp_path / "corpus")
    texts = (f"The fox of part {number} met the crow." for number in range(2000))
    write_tokenizer(train_tokenizer(texts), tmp_path / "base")
    half = _settings(tmp_path, token_budget=12 * 1024)
    PretrainingRun(half).run()
    PretrainingRun(_settings(tmp_path)).run()
    lines = [
        json.loads(line)
        for line in (tmp_path / "cache" / "training_log-reading.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[-1]["tokens"] == 20 * 1024
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert (tmp_path / "base" / "model.safetensors").stat().st_size > 9_000_000
    streams = load_streams(half.corpus, half.out / "tokenizer.json", half.cache, 200, 1)
    assert set(streams) == {"children", "fiction", "instructions", "copies", "echoes"}
    # The second stage goes on with the first one's weights, and keeps a log of its own.
    copying = _settings(tmp_path, stage="copying", token_budget=22 * 1024)
    went_on = PretrainingRun(copying)
    first = load_file(half.checkpoint)
    assert torch.equal(went_on._model.model.norm.weight, first["model/model.norm.weight"])
    went_on.run()
    log = (tmp_path / "cache" / "training_log-copying.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [10, 20]
    assert not torch.equal(
        load_file(copying.checkpoint)["model/model.norm.weight"], first["model/model.norm.weight"]
    )
