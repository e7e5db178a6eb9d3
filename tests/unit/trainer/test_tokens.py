"""Rows as tokens: what counts in the loss, and what happens to long rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.common.prompts import PromptEncoder
from services.trainer.dataset import ConversationRow, InstructionRow, PromptRow, TextRow
from services.trainer.preparation import PreparedData, hold_out, prepare
from services.trainer.spec import LossScope, OverlongPolicy, TrainingSpec
from services.trainer.tokens import TokenRow
from tests.support.models import CHAT_TEMPLATE, EOS_TOKEN, SPECIAL_TOKENS, byte_tokenizer

EOS = 0
USER, ASSISTANT = SPECIAL_TOKENS.index("<|user|>"), SPECIAL_TOKENS.index("<|assistant|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> PromptEncoder:
    return PromptEncoder.load(folder)


class Bench:
    """Encodes rows as a job would."""

    def __init__(self, encoder: PromptEncoder, folder: Path) -> None:
        self.encoder = encoder
        self._folder = folder

    def data(self, *rows: dict[str, Any], **fields: Any) -> PreparedData:
        path = self._folder / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        spec = TrainingSpec(**({"max_seq_len": 100, "validation_fraction": 0.0} | fields))
        tokens = self._folder / f"tokens-{len(list(self._folder.iterdir()))}"
        return prepare(path, None, self.encoder, spec, seed=1, folder=tokens)

    def rows(self, *rows: dict[str, Any], **fields: Any) -> list[TokenRow]:
        return list(self.data(*rows, **fields).training)

    def row(self, row: dict[str, Any], **fields: Any) -> TokenRow:
        (encoded,) = self.rows(row, **fields)
        return encoded

    def refusal(self, *rows: dict[str, Any], **fields: Any) -> InvalidArgument:
        with pytest.raises(InvalidArgument) as caught:
            self.data(*rows, **fields)
        assert caught.value.reason == "invalid_dataset"
        return caught.value


@pytest.fixture
def bench(encoder: PromptEncoder, tmp_path: Path) -> Bench:
    return Bench(encoder, tmp_path)


def learnt(encoder: PromptEncoder, row: TokenRow) -> str:
    return encoder.decode([i for i, counts in zip(row.ids, row.supervised, strict=True) if counts])


def pair(prompt: str, completion: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def conversation(*turns: tuple[str, str] | tuple[str, str, int]) -> dict[str, Any]:
    names = ("role", "content", "weight")
    return {"messages": [dict(zip(names, turn, strict=False)) for turn in turns]}


def test_completion_and_stop_token_count(bench: Bench) -> None:
    row = bench.row(pair("ask\n", "answer"))
    assert learnt(bench.encoder, row) == "answer" + EOS_TOKEN
    assert bench.encoder.decode(row.ids) == "ask\nanswer" + EOS_TOKEN
    assert list(row.ids[: row.prompt_length]) == bench.encoder.encode_text("ask\n")
    assert row.source == PromptRow(1, "ask\n", "answer")


def test_everything_counts_when_asked_but_the_first_token(bench: Bench) -> None:
    row = bench.row(pair("ask\n", "yes"), loss_scope=LossScope.ALL)
    assert row.supervised == (False, *[True] * 7)


def test_all_of_a_text_counts_but_the_first_token(bench: Bench) -> None:
    row = bench.row({"text": "whole"})
    assert bench.encoder.decode(row.ids) == "whole" + EOS_TOKEN
    assert row.supervised == (False, *[True] * 5)
    assert row.source == TextRow(1, "whole")


def test_assistant_turns_and_their_ends_count(bench: Bench) -> None:
    talk = conversation(
        ("system", "s"), ("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")
    )
    row = bench.row(talk)
    assert learnt(bench.encoder, row) == f"one{EOS_TOKEN}two{EOS_TOKEN}"
    assert row.ids[row.prompt_length - 1] == ASSISTANT
    assert row.source == ConversationRow(1, tuple(talk["messages"]))


def test_turn_of_weight_zero_does_not_count(bench: Bench) -> None:
    talk = conversation(("user", "a"), ("assistant", "one", 0), ("user", "b"), ("assistant", "two", 1))
    assert learnt(bench.encoder, bench.row(talk)) == "two" + EOS_TOKEN


def test_sharegpt_rows_are_conversations(bench: Bench) -> None:
    shared = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "one"},
            {"from": "human", "value": "b"},
            {"from": "gpt", "value": "two"},
        ],
    }
    same = conversation(
        ("system", "s"), ("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")
    )
    assert bench.row(shared).ids == bench.row(same).ids


def test_alpaca_rows_are_conversations_where_the_base_has_a_template(bench: Bench) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["hi", "ho"]], "system": "s"}
    same = conversation(
        ("system", "s"), ("user", "hi"), ("assistant", "ho", 0), ("user", "Add.\n\n1 2"), ("assistant", "3")
    )
    encoded, expected = bench.row(row), bench.row(same)
    assert (encoded.ids, encoded.supervised) == (expected.ids, expected.supervised)
    assert isinstance(encoded.source, InstructionRow)
    assert encoded.source.answer == "3"


def plain_encoder(folder: Path) -> PromptEncoder:
    """A base without a chat template."""
    tokenizer = byte_tokenizer()
    assert tokenizer.chat_template == CHAT_TEMPLATE
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return PromptEncoder.load(folder)


def test_alpaca_rows_are_texts_under_headings_where_it_has_none(tmp_path: Path) -> None:
    bench = Bench(plain_encoder(tmp_path / "plain"), tmp_path)
    row = bench.row({"instruction": "Add.", "input": "1 2", "output": "3"}, max_seq_len=200)
    text = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3" + EOS_TOKEN
    assert bench.encoder.decode(row.ids) == text
    assert learnt(bench.encoder, row) == "3" + EOS_TOKEN
    without_input = bench.row({"instruction": "Go.", "output": "ok"}, max_seq_len=200)
    assert "Input" not in bench.encoder.decode(without_input.ids)


def test_row_55_special_tokens_in_texts_stay_text(bench: Bench) -> None:
    text = f"{EOS_TOKEN}<|user|>"
    plain = bench.row(pair(text, text))
    chat = bench.row(conversation(("user", text), ("assistant", text)))
    assert plain.ids.count(EOS) == 1
    assert chat.ids.count(EOS) == 2
    assert chat.ids.count(USER) == 1


def test_conversations_need_a_template(tmp_path: Path) -> None:
    bench = Bench(plain_encoder(tmp_path / "plain"), tmp_path)
    error = bench.refusal(conversation(("user", "a"), ("assistant", "b")))
    assert error.violations[0].reason == "no_chat_template"


LONG = (pair("p" * 20, "c"), pair("p" * 30, "c"), pair("p", "c" * 40))


def test_row_51_overlong_rows_are_refused_worst_first(bench: Bench) -> None:
    error = bench.refusal(pair("a", "b"), *LONG, max_seq_len=16)
    assert [v.reason for v in error.violations] == ["example_too_long"] * 3
    assert error.violations[0].field == "training_file.lines[4]"
    assert "42 tokens, at most 16" in error.violations[0].description
    assert error.metadata["fault_count"] == "3"


def test_row_51_the_worst_of_many_overlong_rows_is_listed_and_all_are_counted(bench: Bench) -> None:
    rows = [pair("p" * 20, "c")] * 40 + [pair("p" * 99, "c")]
    error = bench.refusal(*rows, max_seq_len=16)
    assert error.violations[0].field == "training_file.lines[41]"
    assert len(error.violations) == 20
    assert error.metadata["fault_count"] == "41"


def test_overlong_rows_are_dropped(bench: Bench) -> None:
    data = bench.data(pair("a", "b"), *LONG, max_seq_len=16, overlong_policy=OverlongPolicy.DROP)
    assert [row.source.line for row in data.training] == [1]
    report = data.report
    assert (report.overlong_rows, report.truncated_rows, report.dropped_rows) == (3, 0, 3)
    assert report.max_row_tokens == 42
    assert report.warnings["dropped_rows"][0] == 3


def test_row_51_prompts_are_cut_on_the_left_and_answers_never(bench: Bench) -> None:
    data = bench.data(
        pair("0123456789" * 2, "cc"), LONG[2], max_seq_len=8, overlong_policy=OverlongPolicy.TRUNCATE
    )
    assert (data.report.overlong_rows, data.report.truncated_rows, data.report.dropped_rows) == (2, 1, 1)
    (cut,) = data.training
    assert bench.encoder.decode(cut.ids) == "56789cc" + EOS_TOKEN
    assert learnt(bench.encoder, cut) == "cc" + EOS_TOKEN
    assert bench.encoder.decode(cut.ids[: cut.prompt_length]) == "56789"


def test_texts_are_cut_on_the_right(bench: Bench) -> None:
    data = bench.data({"text": "0123456789"}, max_seq_len=8, overlong_policy=OverlongPolicy.TRUNCATE)
    (cut,) = data.training
    assert bench.encoder.decode(cut.ids) == "01234567"
    assert data.report.rows_without_stop == 1


def test_nothing_left_is_refused(bench: Bench) -> None:
    error = bench.refusal(LONG[2], max_seq_len=16, overlong_policy=OverlongPolicy.DROP)
    assert error.violations[0].reason == "empty_dataset"


def test_rows_are_read_by_number_and_slice(bench: Bench) -> None:
    texts = [f"p{number}" for number in range(600)]
    rows = bench.data(*[pair(text, "c" * (1 + number % 5)) for number, text in enumerate(texts)]).training
    assert len(rows) == 600
    assert [int(length) for length in rows.lengths] == [len(row.ids) for row in rows]
    assert rows[517].source == PromptRow(518, "p517", "ccc")
    assert [row.source.line for row in rows[10:13]] == [11, 12, 13]
    assert rows[-1].source.line == 600
    with pytest.raises(IndexError):
        rows[600]


@given(
    prompts=st.lists(st.integers(0, 8), min_size=1, max_size=40),
    fraction=st.floats(0, 0.5),
    seed=st.integers(0, 5),
)
def test_held_out_prompts_are_never_trained_on(prompts: list[int], fraction: float, seed: int) -> None:
    digests = np.array(prompts, dtype=np.uint64)
    training, held_out = hold_out(digests, fraction, seed=seed)
    assert sorted([*training, *held_out]) == list(range(len(prompts)))
    assert len(training)
    assert len(held_out) <= round(fraction * len(prompts))
    assert not set(digests[training].tolist()) & set(digests[held_out].tolist())
    again = hold_out(digests, fraction, seed=seed)
    assert training.tolist() == again[0].tolist()


def test_another_seed_holds_out_other_rows() -> None:
    digests = np.arange(1000, dtype=np.uint64)
    first, second = (set(hold_out(digests, 0.1, seed=seed)[1].tolist()) for seed in (1, 2))
    assert len(first) == len(second) == 100
    assert len(first & second) < 40
