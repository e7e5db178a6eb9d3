"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from lorafleet.inference.v1.generation_pb2 import PositionLogprobs, TokenLogprob
from services.gateway.logprobs import CompletionLogprobs, chat_logprobs, joined


def position(token: bytes, logprob: float, *alternatives: tuple[bytes, float]) -> PositionLogprobs:
    return PositionLogprobs(
        chosen=TokenLogprob(text=token, logprob=logprob),
        alternatives=[TokenLogprob(text=text, logprob=value) for text, value in alternatives],
    )


def test_chat_entries_carry_bytes() -> None:
    shown = chat_logprobs([position("é".encode(), -0.25, (b"e", -1.5))])
    assert shown["content"] == [
        {
            "token": "é",
            "logprob": -0.25,
            "bytes": [195, 169],
            "top_logprobs": [{"token": "e", "logprob": -1.5, "bytes": [101]}],
        }
    ]


def test_half_characters_are_shown_as_bytes_and_offsets_count_whole_ones() -> None:
    first, second = "😀".encode()[:2], "😀".encode()[2:]
    shown = CompletionLogprobs(0).of([position(first, -1), position(second, -1), position(b"!", -1)])
    assert shown["tokens"] == ["bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "!"]
    assert shown["text_offset"] == [0, 0, 1]
    assert shown["top_logprobs"] is None


def test_an_echoed_prompt_begins_with_null_and_goes_on_in_the_completion() -> None:
    builder = CompletionLogprobs(2)
    prompt = builder.of_prompt(b"The", [position(b" cat", -2.0, (b" dog", -1.0), (b" cat", -2.0))])
    whole = joined([prompt, builder.of([position(b" sat", -0.5, (b" sat", -0.5))])])
    assert whole == {
        "tokens": ["The", " cat", " sat"],
        "token_logprobs": [None, -2.0, -0.5],
        "top_logprobs": [None, {" dog": -1.0, " cat": -2.0}, {" sat": -0.5}],
        "text_offset": [0, 3, 7],
    }


def test_the_chosen_token_is_among_the_top_ones_and_minus_infinity_is_a_number() -> None:
    shown = CompletionLogprobs(1).of([position(b"z", float("-inf"), (b"a", -0.1), (b"b", -0.2))])
    assert shown["top_logprobs"] == [{"a": -0.1, "z": -9999.0}]
    assert shown["token_logprobs"] == [-9999.0]
