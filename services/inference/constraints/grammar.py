"""One constraint's text, and what llguidance makes of it within our limits."""

from __future__ import annotations

import enum
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# A mask takes milliseconds at most at these limits, whatever the grammar; the work is counted, not timed.
LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=100_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# Weak models would fill their whole context with the white space that JSON allows.
_WHITESPACE = r"[ \n\r\t]{0,20}"


class ConstraintKind(enum.Enum):
    """How a constraint is written; the value is its field in `SamplingParams`."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"

    @property
    def reason(self) -> str:
        """Why a constraint of this kind is refused."""
        return _REASONS[self]


_REASONS = {
    ConstraintKind.JSON_SCHEMA: "schema_too_complex",
    ConstraintKind.REGEX: "unsupported_regex",
    ConstraintKind.GRAMMAR: "unsupported_grammar",
}


def matcher(kind: ConstraintKind, text: str, tokenizer: LLTokenizer) -> LLMatcher:
    """Return a matcher at the beginning of an output.

    Raises:
        ValueError: the text is not valid, is too large, or no output fits it.
    """
    match kind:
        case ConstraintKind.JSON_SCHEMA:
            source = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})
        case ConstraintKind.REGEX:
            source = LLMatcher.grammar_from_regex(text)
        case ConstraintKind.GRAMMAR:
            source = LLMatcher.grammar_from_lark(text)
    made = LLMatcher(tokenizer, source, log_level=0, limits=LIMITS)
    if not made.is_error():
        # The first mask is where a grammar that is too large shows.
        made.deep_copy().compute_bitmask()
    if made.is_error():
        raise ValueError(_first_line(made.get_error()))
    if made.is_stopped():
        raise ValueError("no output fits it")
    return made


def _first_line(error: str) -> str:
    return (error.strip().splitlines() or ["unknown"])[0][:200]
