"""LoRAX's objects out of what inference says."""

from __future__ import annotations

import pytest

from lorafleet.inference.v1 import generation_pb2 as gen
from services.common.errors import Internal
from services.gateway.lorax.answer import Answer, split

STOP = gen.FinishReason.FINISH_REASON_STOP


def delta(text: str, *tokens: bytes) -> gen.Delta:
    positions = [gen.PositionLogprobs(chosen=gen.TokenLogprob(text=token, logprob=-1)) for token in tokens]
    return gen.Delta(text=text, logprobs=positions)


def test_text_that_was_held_back_is_not_lost_in_an_end_token() -> None:
    answer = Answer()
    answer.add(delta("", b"EN"))
    answer.add(delta("EN", b"</s>"))
    answer.finish(gen.Finished(reason=STOP))
    assert answer.text == "EN"
    assert "".join(token.text for token in answer.tokens if not token.is_special) == "EN"


def test_tokens_that_come_at_once_keep_text_and_end_apart() -> None:
    answer = Answer()
    answer.add(delta("a", b"a", b"</s>"))
    answer.finish(gen.Finished(reason=STOP))
    assert [(token.text, token.is_special) for token in answer.tokens] == [("a", False), ("</s>", True)]
    assert answer.text == "a"


def test_a_cut_at_the_length_has_no_special_token() -> None:
    answer = Answer()
    answer.add(delta("", "é".encode()[:1]))
    answer.finish(gen.Finished(reason=gen.FinishReason.FINISH_REASON_LENGTH))
    assert [token.is_special for token in answer.tokens] == [False]
    assert answer.details(None)["finish_reason"] == "length"


def test_no_end_no_details() -> None:
    with pytest.raises(Internal):
        Answer().details(None)


def test_places_in_a_text() -> None:
    tokens = [b"<s>", b" He", b"llo", "é".encode()[:1], "é".encode()[1:], b"!"]
    objects = split("Helloé!", range(len(tokens)), tokens)
    places = [(entry["start"], entry["stop"]) for entry in objects]
    assert places == [(0, 0), (0, 2), (2, 5), (5, 6), (5, 6), (6, 7)]
    assert ["Helloé!"[start:stop] for start, stop in places] == ["", "He", "llo", "é", "é", "!"]
