"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from lorafleet.inference.v1.generation_pb2 import PositionLogprobs, TokenLogprob

# Stands for minus infinity, which JSON cannot say; OpenAI's API uses the same number.
LOWEST_LOGPROB = -9999.0


def chat_logprobs(positions: Iterable[PositionLogprobs]) -> dict[str, Any]:
    """Return the `logprobs` object of a chat choice: one entry per token, with its bytes."""
    content = [
        {
            **_chat_token(position.chosen),
            "top_logprobs": [_chat_token(alternative) for alternative in position.alternatives],
        }
        for position in positions
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Builds the `logprobs` objects of one completion choice: four parallel lists.

    `text_offset` counts characters from the beginning of the choice's text, so it goes on from call to call.
    """

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def of_prompt(self, first_token: bytes, positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
        """Return the object for an echoed prompt; its first token has no log-probability, so null."""
        lists = self._empty()
        self._add(lists, first_token, None, None)
        return self._with(lists, positions)

    def of(self, positions: Iterable[PositionLogprobs]) -> dict[str, Any]:
        """Return the object for the next tokens."""
        return self._with(self._empty(), positions)

    def _with(self, lists: dict[str, Any], positions: Iterable[PositionLogprobs]) -> dict[str, Any]:
        for position in positions:
            self._add(lists, position.chosen.text, finite(position.chosen.logprob), self._top(position))
        return lists

    def _empty(self) -> dict[str, Any]:
        return {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [] if self._alternatives else None,
            "text_offset": [],
        }

    def _add(
        self, lists: dict[str, Any], token: bytes, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        lists["tokens"].append(token_text(token))
        lists["token_logprobs"].append(logprob)
        if lists["top_logprobs"] is not None:
            lists["top_logprobs"].append(top)
        lists["text_offset"].append(self._offset)
        self._offset += len(self._decoder.decode(token))

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        """Return the alternatives and the chosen token; of tokens with equal text the likeliest stays."""
        top: dict[str, float] = {}
        for entry in (*position.alternatives[: self._alternatives], position.chosen):
            text = token_text(entry.text)
            top[text] = max(finite(entry.logprob), top.get(text, LOWEST_LOGPROB))
        return top


def joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return consecutive objects of one choice as one."""
    first, *others = parts
    for part in others:
        for name, values in part.items():
            if values is not None:
                first[name] += values
    return first


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token_text(token.text), "logprob": finite(token.logprob), "bytes": list(token.text)}


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can say."""
    return max(logprob, LOWEST_LOGPROB)


def token_text(token: bytes) -> str:
    """Return a token's text; bytes that are no whole characters are shown as OpenAI shows them."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
