"""Text comes out whole: complete characters, and nothing past a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.common.errors import FailedPrecondition
from services.common.token_bytes import TokenBytes
from services.inference.engine.text import Detokenizer, StopMatcher, TextStream
from tests.support.models import byte_tokenizer


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


def token_text(tokenizer: PreTrainedTokenizerFast) -> TokenBytes:
    return TokenBytes(tokenizer.backend_tokenizer, special_tokens_have_text=False)


BYTE_LEVEL = byte_tokenizer()
BYTE_FALLBACK = sentencepiece_tokenizer()
TEXT = token_text(BYTE_LEVEL)
FALLBACK_TEXT = token_text(BYTE_FALLBACK)
PROMPT = BYTE_LEVEL.encode("Say: ")
NUM_IDS = {"byte level": 264, "byte fallback": 259}
TOKENIZERS = {"byte level": (BYTE_LEVEL, TEXT), "byte fallback": (BYTE_FALLBACK, FALLBACK_TEXT)}


def pieces_of(text: TokenBytes, tokens: list[int], prompt: list[int], *, is_cut: bool = False) -> list[str]:
    detokenizer = Detokenizer(text, prompt)
    return [*map(detokenizer.push, tokens), detokenizer.flush(is_cut=is_cut)]


def tokens_of(name: str, text: str) -> list[int]:
    return BYTE_LEVEL.encode(text) if name == "byte level" else [3 + byte for byte in text.encode()]


def test_a_character_of_four_tokens_comes_out_once_and_whole() -> None:
    assert pieces_of(TEXT, BYTE_LEVEL.encode("a😀b"), PROMPT) == ["a", "", "", "", "😀", "b", ""]
    assert pieces_of(FALLBACK_TEXT, [3 + byte for byte in "😀é".encode()], [1])[3::2] == ["😀", "é"]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=30))
def test_row_101_the_pieces_make_the_text(name: str, text: str) -> None:
    pieces = pieces_of(TOKENIZERS[name][1], tokens_of(name, text), [1])
    assert "".join(pieces) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(min_size=1, max_size=20), data=st.data())
def test_row_101_a_cut_text_ends_with_a_whole_character(name: str, text: str, data: st.DataObject) -> None:
    tokens = tokens_of(name, text)
    length = data.draw(st.integers(0, len(tokens)))
    pieces = pieces_of(TOKENIZERS[name][1], tokens[:length], [1], is_cut=True)
    cut = "".join(pieces)
    assert text.startswith(cut)
    assert len(cut.encode()) > length - 4


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_any_tokens_stream_as_they_decode_at_once(name: str, data: st.DataObject) -> None:
    """Whatever a model makes: control tokens, ids beyond the vocabulary, bytes that are no text."""
    tokenizer, text = TOKENIZERS[name]
    tokens = data.draw(st.lists(st.integers(0, NUM_IDS[name] - 1), max_size=40))
    streamed = "".join(pieces_of(text, tokens, [1]))
    assert streamed == b"".join(text[token] for token in tokens).decode("utf-8", "replace")
    if name == "byte level" or "\ufffd" not in streamed:
        # The library's byte fallback marks every byte of a run with one bad byte as bad.
        whole = tokenizer.decode([1, *tokens], skip_special_tokens=True)
        assert streamed == whole.removeprefix(tokenizer.decode([1], skip_special_tokens=True))


@given(
    tokens=st.lists(st.sampled_from([6 + 0xC3, *BYTE_LEVEL.encode("😀é")]), max_size=12),
    at=st.integers(0, 12),
)
def test_marks_stand_only_for_bytes_that_can_be_no_text(tokens: list[int], at: int) -> None:
    streamed = "".join(pieces_of(TEXT, tokens[:at], PROMPT))
    data = b"".join(TEXT[token] for token in tokens[:at])
    try:
        data.decode()
    except UnicodeDecodeError:
        assert "\ufffd" in streamed
    else:
        assert "\ufffd" not in streamed


def test_a_prompt_may_end_within_a_character() -> None:
    tokens = BYTE_LEVEL.encode("😀")
    assert pieces_of(TEXT, tokens[2:], [*PROMPT, *tokens[:2]]) == ["", "😀", ""]
    # What the prompt began and the output does not finish is none of the output's text.
    assert pieces_of(TEXT, BYTE_LEVEL.encode("xy"), [*PROMPT, *tokens[:2]]) == ["x", "y", ""]
    assert pieces_of(TEXT, [], [*PROMPT, *tokens[:3]]) == [""]


def test_an_unfinished_character_is_replaced_where_the_model_ended_and_dropped_where_it_was_cut() -> None:
    begun = BYTE_LEVEL.encode("é")[:1]
    assert pieces_of(TEXT, begun, PROMPT) == ["", "\ufffd"]
    assert pieces_of(TEXT, begun, PROMPT, is_cut=True) == ["", ""]


def test_bytes_that_never_make_a_character_are_not_held() -> None:
    continuation = BYTE_LEVEL.encode("é")[1]
    assert pieces_of(TEXT, [continuation] * 40, PROMPT) == ["\ufffd"] * 40 + [""]


def test_special_tokens_and_ids_beyond_the_tokenizer_have_no_text() -> None:
    (letter,) = BYTE_LEVEL.encode("x")
    assert pieces_of(TEXT, [0, 263, 5, letter], PROMPT) == ["", "", "", "x", ""]
    begun, ended = BYTE_LEVEL.encode("é")
    assert pieces_of(TEXT, [begun, 5, ended], PROMPT) == ["", "", "é", ""]


def test_word_spaces_survive_in_a_sentencepiece_stream() -> None:
    assert pieces_of(FALLBACK_TEXT, [2, 1], [1]) == [" two", " one", ""]


def test_a_tokenizer_whose_text_is_more_than_its_bytes_is_refused() -> None:
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(FailedPrecondition) as caught:
        TokenBytes(tokenizer)
    assert (caught.value.reason, caught.value.value) == ("tokenizer_unsupported", "'WordPiece'")


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
    text = TextStream(TEXT, PROMPT, ("\ufffd",))
    assert text.push(BYTE_LEVEL.encode("é")[0], look_for_stops=True) == ("", None)
    assert text.flush() == ("", "\ufffd")


def test_stops_are_not_looked_for_when_told_so() -> None:
    text = TextStream(TEXT, PROMPT, ("a",))
    (token,) = BYTE_LEVEL.encode("a")
    looked: list[Any] = [text.push(token, look_for_stops=False), text.push(token, look_for_stops=True)]
    assert looked == [("a", None), ("", "a")]
