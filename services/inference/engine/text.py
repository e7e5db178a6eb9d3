"""From tokens to text: complete characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and so at most four tokens; more tokens than this without a complete
# character are not the beginning of one.
_MAX_HELD_TOKENS = 8
# Bytes that are no text at all may come without end; what is decoded again and again must not grow with them.
_MAX_WINDOW_TOKENS = 64
_CONTEXT_TOKENS = 6


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """Turns a stream of tokens into text, holding back the bytes of an unfinished character.

    The text of a token depends on its neighbours (a leading space, the bytes of one character), so each new
    token is decoded together with those before it, and what is new in the result is emitted.
    """

    def __init__(self, decoder: Decoder, prompt_token_ids: Tokens[int]) -> None:
        self._decoder = decoder
        self._tokens = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        while len(self._tokens) > 1 and self._decode(self._tokens).startswith(_REPLACEMENT):
            del self._tokens[0]
        # The part of the tokens' text that belongs to the prompt or has been emitted.
        self._known = self._decode(self._tokens)
        self._num_held = 0

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is now certain."""
        self._tokens.append(token_id)
        self._num_held += 1
        text = self._decode(self._tokens)
        if not text.endswith(_REPLACEMENT) or self._num_held >= _MAX_WINDOW_TOKENS:
            return self._emit(text, is_settled=True)
        if self._num_held < _MAX_HELD_TOKENS:
            return ""
        # So many bytes are not one character: only the last mark may still become one.
        return self._emit(text[:-1], is_settled=False)

    def flush(self) -> str:
        """Return what is held back, as it stands."""
        return self._emit(self._decode(self._tokens), is_settled=True)

    def _emit(self, text: str, *, is_settled: bool) -> str:
        known = self._known
        # A prompt that ends within a character has its replacement mark replaced by what completes it.
        while known.endswith(_REPLACEMENT) and not text.startswith(known):
            known = known[:-1]
        new = text[len(known) :]
        self._known = text
        if is_settled and (new or len(self._tokens) > _MAX_WINDOW_TOKENS):
            # What was just emitted is the context of what comes next; a token without text would be a poor
            # one.
            self._tokens = self._tokens[-self._num_held if new else -_CONTEXT_TOKENS :]
            self._known = self._decode(self._tokens)
            self._num_held = 0
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=True)


class StopMatcher:
    """Finds the first of several stop strings in a stream of text, however the stream is cut."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add `text`; return the text that is now certain, and the stop string if one is complete."""
        text = self._held + text
        self._held = ""
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            # The first to be complete counts, so that the answer does not depend on how the stream is cut.
            end, _, stop = min(ends)
            return text[: end - len(stop)], stop
        keep = self._possible_beginning(text)
        if keep:
            self._held = text[-keep:]
            return text[:-keep], None
        return text, None

    def flush(self) -> str:
        """Return what is held back."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class TextStream:
    """The text of one sequence."""

    def __init__(self, decoder: Decoder, prompt_token_ids: Tokens[int], stops: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(decoder, prompt_token_ids)
        self._matcher = StopMatcher(stops)

    def push(self, token_id: int, *, look_for_stops: bool) -> tuple[str, str | None]:
        """Add a token; return the text that is now certain, and the stop string if one is complete.

        Text that comes while stops are not looked for can not be part of a later match.
        """
        text = self._detokenizer.push(token_id)
        if not look_for_stops:
            return text, None
        return self._matcher.push(text)

    def flush(self) -> tuple[str, str | None]:
        """End the stream: return the rest of the text, up to a stop string if the rest completes one."""
        text, stop = self._matcher.push(self._detokenizer.flush())
        return (text, stop) if stop is not None else (text + self._matcher.flush(), None)
