"""The bytes that each token stands for, read out of a tokenizer's vocabulary and decoder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from tokenizers import Tokenizer

from services.common.errors import FailedPrecondition

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
# Steps of a decoder that join the bytes of tokens; a space stripped at a text's beginning is no matter here.
_JOINING_STEPS = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Strip"})


class TokenBytes:
    """Maps token ids to bytes; a token may be a part of a character.

    Special and other added tokens stand for their own text, or special ones for none. An id that the
    tokenizer does not know (bases round their vocabularies up) stands for nothing.
    """

    def __init__(self, tokenizer: Tokenizer, *, special_tokens_have_text: bool = True) -> None:
        """Read a tokenizer.

        Raises:
            FailedPrecondition: `tokenizer_unsupported` where its decoder does more than to join bytes.
        """
        decoder = json.loads(tokenizer.to_str())["decoder"] or {}
        steps = list(_steps(decoder))
        _check(steps)
        is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
        added = {
            token_id: "" if token.special and not special_tokens_have_text else token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._bytes: dict[int, bytes] = {
            token_id: _byte_level(token) if is_byte_level else _piece(token)
            for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items()
        }
        self._bytes |= {token_id: content.encode() for token_id, content in added.items()}
        self.longest = max(map(len, self._bytes.values()), default=1)
        """Bytes of the longest token."""

    def __getitem__(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder:
        yield decoder


def _check(steps: list[dict[str, Any]]) -> None:
    for step in steps:
        is_word_start = step["type"] == "Replace" and step["pattern"] == {"String": _WORD_START}
        if step["type"] not in _JOINING_STEPS and not (is_word_start and step["content"] == " "):
            raise FailedPrecondition(
                "tokenizer_unsupported",
                f"The tokenizer's decoder has a step {step['type']}; its text cannot be streamed.",
                field="tokenizer.json",
                value=step["type"],
                limit=", ".join(sorted(_JOINING_STEPS)),
            )


def _byte_level(token: str) -> bytes:
    table = _bytes_of_characters()
    return b"".join(
        bytes([table[character]]) if character in table else character.encode() for character in token
    )


def _piece(token: str) -> bytes:
    """Return the bytes of a SentencePiece token: a byte as such, or text with its word start as a space."""
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(_WORD_START, " ").encode()


@cache
def _bytes_of_characters() -> dict[str, int]:
    """Return GPT-2's map (Radford et al. 2019): printable Latin-1 as itself, other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
