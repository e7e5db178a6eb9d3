"""From tokens to text: complete characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence as Tokens
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and so at most three tokens before the one that completes it.
_MAX_OPEN_TOKENS = 3

_Utf8 = codecs.getincrementaldecoder("utf-8")


class TokenText(Protocol):
    """What is needed of a tokenizer: the bytes of each id, none for control tokens."""

    def __getitem__(self, token_id: int) -> bytes: ...


class Detokenizer:
    """Turns a stream of tokens into text, holding back the bytes of an unfinished character.

    Bytes that are no UTF-8 become replacement characters as Unicode recommends (one for each maximal part of
    a character), so the pieces make the same text as all bytes decoded at once.
    """

    def __init__(self, token_text: TokenText, prompt_token_ids: Tokens[int]) -> None:
        self._token_text = token_text
        self._utf8 = _Utf8(errors="replace")
        self._utf8.decode(b"".join(token_text[token_id] for token_id in prompt_token_ids[-_MAX_OPEN_TOKENS:]))
        # The prompt's last character may be unfinished. If the output does not finish it, that is no text.
        self._is_open_from_prompt = self._holds

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is now certain."""
        return self._told(self._utf8.decode(self._token_text[token_id]))

    def flush(self, *, is_cut: bool) -> str:
        """Return what is held back: the mark of a broken character, or nothing where the output `is_cut`."""
        return "" if is_cut else self._told(self._utf8.decode(b"", True))

    @property
    def _holds(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def _told(self, text: str) -> str:
        if self._is_open_from_prompt and text:
            self._is_open_from_prompt = False
            return text.removeprefix(_REPLACEMENT)
        return text


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

    def __init__(self, token_text: TokenText, prompt_token_ids: Tokens[int], stops: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(token_text, prompt_token_ids)
        self._matcher = StopMatcher(stops)

    def push(self, token_id: int, *, look_for_stops: bool) -> tuple[str, str | None]:
        """Add a token; return the text that is now certain, and the stop string if one is complete.

        Text that comes while stops are not looked for can not be part of a later match.
        """
        text = self._detokenizer.push(token_id)
        if not look_for_stops:
            return text, None
        return self._matcher.push(text)

    def flush(self, *, is_cut: bool = False) -> tuple[str, str | None]:
        """End the stream: return the rest of the text, up to a stop string if the rest completes one.

        Where the output `is_cut`, by its length, the beginning of a character is dropped: the model might
        have completed it.
        """
        text, stop = self._matcher.push(self._detokenizer.flush(is_cut=is_cut))
        return (text, stop) if stop is not None else (text + self._matcher.flush(), None)
