"""Text comes out whole: complete characters, and nothing past a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.inference.engine.text import Detokenizer, StopMatcher, TextStream
from tests.support.models import byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPT = TOKENIZER.encode("Say: ")


def stream(text: str, prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, PROMPT if prompt is None else prompt)
    return [detokenizer.push(token) for token in TOKENIZER.encode(text)] + [detokenizer.flush()]


def test_a_character_of_four_tokens_comes_out_once_and_whole() -> None:
    assert len(TOKENIZER.encode("😀")) == 4
    assert stream("a😀b") == ["a", "", "", "", "😀", "b", ""]


@given(st.text(max_size=30))
def test_the_pieces_make_the_text(text: str) -> None:
    assert "".join(stream(text)) == text


def test_a_prompt_may_end_within_a_character() -> None:
    tokens = TOKENIZER.encode("😀")
    detokenizer = Detokenizer(TOKENIZER, [*PROMPT, *tokens[:2]])
    assert [detokenizer.push(token) for token in tokens[2:]] == ["", "😀"]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    detokenizer = Detokenizer(TOKENIZER, PROMPT)
    assert [detokenizer.push(token) for token in TOKENIZER.encode("é")[:1]] == [""]
    assert detokenizer.flush() == "\ufffd"


def test_bytes_that_never_make_a_character_are_not_held_for_ever() -> None:
    continuation = TOKENIZER.encode("é")[1]
    detokenizer = Detokenizer(TOKENIZER, PROMPT)
    pieces = [detokenizer.push(continuation) for _ in range(40)]
    assert "".join(pieces).count("\ufffd") >= 32
    assert detokenizer.push(TOKENIZER.encode("x")[0]).endswith("x")


def test_special_tokens_and_ids_beyond_the_tokenizer_have_no_text() -> None:
    detokenizer = Detokenizer(TOKENIZER, PROMPT)
    assert [detokenizer.push(token) for token in (0, 263, 5)] == ["", "", ""]
    assert detokenizer.push(TOKENIZER.encode("x")[0]) == "x"


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a leading space mark and byte tokens for the rest, as in Llama's tokenizer."""
    pieces = ["<unk>", "▁one", "▁two", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_word_spaces_survive_in_a_sentencepiece_stream() -> None:
    tokenizer = sentencepiece_tokenizer()
    detokenizer = Detokenizer(tokenizer, [1])
    assert [detokenizer.push(token) for token in (2, 1)] == [" two", " one"]


def test_characters_of_byte_tokens_side_by_side() -> None:
    tokenizer = sentencepiece_tokenizer()
    detokenizer = Detokenizer(tokenizer, [1])
    tokens = [3 + byte for byte in "😀é😀".encode()]
    assert "".join(detokenizer.push(token) for token in tokens) == "😀é😀"


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "stop"),
    [
        (("END",), ["a E", "N", "D b"], "a ", "END"),
        (("END",), ["a E", "N", "O"], "a ENO", None),
        (("\n\n",), ["x\n", "\ny"], "x", "\n\n"),
        (("bc", "abcd"), ["ab", "cd"], "a", "bc"),
        (("ab", "abc"), ["abc"], "", "ab"),
        (("aab",), ["a", "a", "a", "b"], "a", "aab"),
        ((), ["abc", "d"], "abcd", None),
    ],
)
def test_stop_strings_across_pieces(
    stops: tuple[str, ...], pieces: list[str], expected: str, stop: str | None
) -> None:
    matcher = StopMatcher(stops)
    text, found = "", None
    for piece in pieces:
        out, found = matcher.push(piece)
        text += out
        if found is not None:
            break
    if found is None:
        text += matcher.flush()
    assert (text, found) == (expected, stop)


@given(
    text=st.text(alphabet="abc", max_size=30), stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4))
)
def test_however_it_is_cut_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(tuple(stops))
    out, found = "", None
    for character in text:
        piece, found = matcher.push(character)
        out += piece
        if found is not None:
            break
    if found is None:
        out += matcher.flush()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        assert found is not None
        assert text.startswith(out + found)
        assert len(out) + len(found) == min(ends)
    else:
        assert (out, found) == (text, None)


def test_a_stop_string_in_the_last_held_bytes_is_found_at_the_end() -> None:
    text = TextStream(TOKENIZER, PROMPT, ("\ufffd",))
    assert text.push(TOKENIZER.encode("é")[0], look_for_stops=True) == ("", None)
    assert text.flush() == ("", "\ufffd")


def test_stops_are_not_looked_for_when_told_so() -> None:
    text = TextStream(TOKENIZER, PROMPT, ("a",))
    (token,) = TOKENIZER.encode("a")
    looked: list[Any] = [text.push(token, look_for_stops=False), text.push(token, look_for_stops=True)]
    assert looked == [("a", None), ("", "a")]
