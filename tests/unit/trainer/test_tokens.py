"""Rows as tokens: what counts in the loss, and what happens to long rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.common.prompts import PromptEncoder
from services.trainer.dataset import ConversationRow, PromptRow, Row
from services.trainer.preparation import hold_out
from services.trainer.spec import LossScope, OverlongPolicy
from services.trainer.tokens import TokenRow, TokenSet, tokenize
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


def tokens(
    encoder: PromptEncoder,
    *rows: Row,
    max_seq_len: int = 100,
    policy: OverlongPolicy = OverlongPolicy.REJECT,
    scope: LossScope = LossScope.COMPLETIONS,
) -> TokenSet:
    return tokenize(rows, encoder, max_seq_len=max_seq_len, overlong_policy=policy, loss_scope=scope)


def learnt(encoder: PromptEncoder, row: TokenRow) -> str:
    return encoder.decode([i for i, counts in zip(row.ids, row.supervised, strict=True) if counts])


def conversation(*turns: tuple[str, str] | tuple[str, str, int]) -> ConversationRow:
    names = ("role", "content", "weight")
    return ConversationRow(1, tuple(dict(zip(names, turn, strict=False)) for turn in turns))


def test_completion_and_stop_token_count(encoder: PromptEncoder) -> None:
    (row,) = tokens(encoder, PromptRow(1, "ask\n", "answer")).rows
    assert learnt(encoder, row) == "answer" + EOS_TOKEN
    assert encoder.decode(row.ids) == "ask\nanswer" + EOS_TOKEN
    assert list(row.ids[: row.prompt_length]) == encoder.encode_text("ask\n")


def test_everything_counts_when_asked_but_the_first_token(encoder: PromptEncoder) -> None:
    (row,) = tokens(encoder, PromptRow(1, "ask\n", "yes"), scope=LossScope.ALL).rows
    assert row.supervised == (False, *[True] * 7)


def test_assistant_turns_and_their_ends_count(encoder: PromptEncoder) -> None:
    row = conversation(
        ("system", "s"), ("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")
    )
    (encoded,) = tokens(encoder, row).rows
    assert learnt(encoder, encoded) == f"one{EOS_TOKEN}two{EOS_TOKEN}"
    assert encoded.ids[encoded.prompt_length - 1] == ASSISTANT


def test_turn_of_weight_zero_does_not_count(encoder: PromptEncoder) -> None:
    row = conversation(("user", "a"), ("assistant", "one", 0), ("user", "b"), ("assistant", "two", 1))
    (encoded,) = tokens(encoder, row).rows
    assert learnt(encoder, encoded) == "two" + EOS_TOKEN


def test_special_tokens_in_texts_stay_text(encoder: PromptEncoder) -> None:
    text = f"{EOS_TOKEN}<|user|>"
    plain, chat = (
        tokens(encoder, PromptRow(1, text, text)).rows[0],
        tokens(encoder, conversation(("user", text), ("assistant", text))).rows[0],
    )
    assert plain.ids.count(EOS) == 1
    assert chat.ids.count(EOS) == 2
    assert chat.ids.count(USER) == 1


def test_conversations_need_a_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.chat_template == CHAT_TEMPLATE
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument) as caught:
        tokens(PromptEncoder.load(tmp_path), conversation(("user", "a"), ("assistant", "b")))
    assert caught.value.violations[0].reason == "no_chat_template"


LONG = (PromptRow(4, "p" * 20, "c"), PromptRow(5, "p" * 30, "c"), PromptRow(6, "p", "c" * 40))


def test_overlong_rows_are_refused_worst_first(encoder: PromptEncoder) -> None:
    with pytest.raises(InvalidArgument) as caught:
        tokens(encoder, PromptRow(1, "a", "b"), *LONG, max_seq_len=16)
    assert [v.reason for v in caught.value.violations] == ["example_too_long"] * 3
    assert caught.value.violations[0].field == "training_file.lines[6]"
    assert "42 tokens, at most 16" in caught.value.violations[0].description
    assert caught.value.metadata["fault_count"] == "3"


def test_overlong_rows_are_dropped(encoder: PromptEncoder) -> None:
    result = tokens(encoder, PromptRow(1, "a", "b"), *LONG, max_seq_len=16, policy=OverlongPolicy.DROP)
    assert [row.source.line for row in result.rows] == [1]
    assert (result.overlong_rows, result.truncated_rows, result.max_row_tokens) == (3, 0, 42)


def test_prompts_are_cut_on_the_left_and_answers_never(encoder: PromptEncoder) -> None:
    row = PromptRow(4, "0123456789" * 2, "cc")
    result = tokens(encoder, row, LONG[2], max_seq_len=8, policy=OverlongPolicy.TRUNCATE)
    assert (result.overlong_rows, result.truncated_rows) == (2, 1)
    (cut,) = result.rows
    assert encoder.decode(cut.ids) == "56789cc" + EOS_TOKEN
    assert learnt(encoder, cut) == "cc" + EOS_TOKEN
    assert encoder.decode(cut.ids[: cut.prompt_length]) == "56789"


def test_nothing_left_is_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(InvalidArgument) as caught:
        tokens(encoder, LONG[2], max_seq_len=16, policy=OverlongPolicy.DROP)
    assert caught.value.violations[0].reason == "empty_dataset"


@given(
    prompts=st.lists(st.integers(0, 8), min_size=1, max_size=40),
    fraction=st.floats(0, 0.5),
    seed=st.integers(0, 5),
)
def test_held_out_prompts_are_never_trained_on(prompts: list[int], fraction: float, seed: int) -> None:
    rows = tuple(TokenRow((1, 2), (False, True), 1, PromptRow(i, str(p), "c")) for i, p in enumerate(prompts))
    training, held_out = hold_out(rows, fraction, seed=seed)
    assert sorted([*training, *held_out], key=lambda row: row.source.line) == list(rows)
    assert training
    assert len(held_out) <= round(fraction * len(rows))
    trained = {row.source.prompt_digest for row in training}
    assert not any(row.source.prompt_digest in trained for row in held_out)
    assert (training, held_out) == hold_out(rows, fraction, seed=seed)
