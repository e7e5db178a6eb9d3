"""The base's tokens as llguidance sees them: bytes, which of them are control tokens, and which end."""

from __future__ import annotations

from dataclasses import dataclass

from llguidance import LLTokenizer
from llguidance._tokenizer import TokenizerWrapper


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a grammar needs to know of a tokenizer.

    Attributes:
        tokens: the bytes of each id, as many as the base has logits; empty for an id without text.
        special_token_ids: control tokens, whose text a grammar never matches.
        eos_token_ids: at least one.
    """

    tokens: tuple[bytes, ...]
    special_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]

    def compiled(self) -> LLTokenizer:
        """Return the tokenizer in llguidance's form: a trie over the bytes."""
        return LLTokenizer(
            TokenizerWrapper(_Source(self)), n_vocab=len(self.tokens), eos_token=list(self.eos_token_ids)
        )


class _Source:
    """The attributes that llguidance reads from a tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special_token_ids
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.bos_token_id = None
        self._single_bytes = {token: id_ for id_, token in enumerate(vocabulary.tokens) if len(token) == 1}

    def __call__(self, text: bytes) -> list[int]:
        # Used for tokens that a grammar forces, which we do not ask for: any spelling is right.
        return [self._single_bytes[bytes([byte])] for byte in text if bytes([byte]) in self._single_bytes]
