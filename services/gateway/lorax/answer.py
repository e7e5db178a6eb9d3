"""LoRAX's objects: tokens, details, and answers as they grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafleet.inference.v1.generation_pb2 import (
    Delta,
    Finished,
    FinishReason,
    PositionLogprobs,
    TokenLogprob,
)
from services.common.errors import Internal
from services.gateway.generation import finish_reason
from services.gateway.logprobs import finite, token_text


@dataclass(slots=True)
class Token:
    """One generated token; `text` is what it adds to the answer, or its own where it is special."""

    position: PositionLogprobs
    text: str
    is_special: bool = False

    def object(self, alternatives: int | None) -> dict[str, Any]:
        """Return LoRAX's token object, with the alternatives where they were asked for."""
        shown = {
            **token_object(self.position.chosen),
            "text": self.text,
            "special": self.is_special,
            "skipped": False,
        }
        if alternatives is not None:
            shown["alternative_tokens"] = [token_object(other) for other in self.position.alternatives]
        return shown


@dataclass(slots=True)
class Answer:
    """One answer; its text is that of its tokens but the special ones."""

    tokens: list[Token] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    end: Finished | None = None

    def add(self, delta: Delta) -> list[Token]:
        """Take what was generated next and return its tokens; of several at once the first has the text."""
        self.texts.append(delta.text)
        fresh = [Token(position, "") for position in delta.logprobs]
        if fresh:
            fresh[0].text = delta.text
        self.tokens += fresh
        return fresh

    def finish(self, finished: Finished) -> None:
        """Take the end: as in LoRAX a stop string belongs to the text, and an end token is special.

        Raises:
            Unavailable: `generation_aborted`.
        """
        is_stop = finish_reason(finished) == "stop"
        self.end = finished
        self.texts.append(finished.stop)
        if not self.tokens:
            return
        last = self.tokens[-1]
        last.text += finished.stop
        if is_stop and not last.text:
            last.text, last.is_special = token_text(last.position.chosen.text), True

    @property
    def text(self) -> str:
        """The answer's text."""
        return "".join(self.texts)

    @property
    def mean_logprob(self) -> float:
        """Mean of the tokens' log-probabilities."""
        return sum(finite(token.position.chosen.logprob) for token in self.tokens) / max(1, len(self.tokens))

    def details(self, seed: int | None) -> dict[str, Any]:
        """Return what LoRAX tells of an answer beside its text and tokens.

        Raises:
            Internal: `incomplete_answer`; inference has told of no end.
        """
        if self.end is None:
            raise Internal("incomplete_answer", "inference ended the answer before its end")
        reason = "stop_sequence" if self.end.stop else "eos_token"
        return {
            "finish_reason": "length" if self.end.reason == FinishReason.FINISH_REASON_LENGTH else reason,
            "prompt_tokens": self.end.usage.prompt_tokens,
            "generated_tokens": self.end.usage.completion_tokens,
            "seed": seed,
        }

    def token_objects(self, alternatives: int | None) -> list[dict[str, Any]]:
        """Return LoRAX's token objects."""
        return [token.object(alternatives) for token in self.tokens]


def token_object(token: TokenLogprob) -> dict[str, Any]:
    """Return a token of an alternative or of the prompt."""
    return {"id": token.token_id, "text": token_text(token.text), "logprob": finite(token.logprob)}


def split(inputs: str, token_ids: Sequence[int], tokens: Sequence[bytes]) -> list[dict[str, Any]]:
    """Return LoRAX's objects of a text's tokens.

    `start` and `stop` count characters of the text. A token that is not in it, as one that begins every
    prompt, stands for none: both are the same. A token that is part of a character stands for the whole one.
    """
    data = inputs.encode()
    objects, place = [], 0
    for token_id, token in zip(token_ids, tokens, strict=True):
        # Some tokenizers put a space in front of a text.
        found = next((form for form in (token, token.lstrip(b" ")) if data.startswith(form, place)), b"")
        end = place + len(found)
        start_char, end_char = _characters(data, place), _characters(data, end)
        if found and _is_inside(data, place):
            start_char -= 1
        objects.append({"id": token_id, "text": token_text(token), "start": start_char, "stop": end_char})
        place = end
    return objects


def _characters(data: bytes, end: int) -> int:
    """Return how many characters begin before `end`."""
    return sum(1 for byte in data[:end] if byte & 0xC0 != 0x80)


def _is_inside(data: bytes, place: int) -> bool:
    return place < len(data) and data[place] & 0xC0 == 0x80
