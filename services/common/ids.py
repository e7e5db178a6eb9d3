"""Sortable random ids: `<prefix>-<26 characters>`, safe in URLs, file names and log lines.

The 26 characters are a ULID in lower-case Crockford base 32: 48 bits of Unix time in milliseconds, then 80
random bits. Ids made in different milliseconds sort by time; nobody can guess one from another.
"""

from __future__ import annotations

import re
import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_LENGTH = 26
_RANDOM_BITS = 80
_PREFIX = re.compile(r"[a-z][a-z0-9]{0,15}")


def new_id(prefix: str, *, now_ms: int | None = None) -> str:
    """Return a new id such as `ftjob-01k9…`.

    Args:
        prefix: one lower-case word of at most 16 characters.
        now_ms: Unix time in milliseconds; the present when absent.
    """
    assert _PREFIX.fullmatch(prefix), f"id prefix {prefix!r} is not one lower-case word"
    milliseconds = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    number = (milliseconds << _RANDOM_BITS) | secrets.randbits(_RANDOM_BITS)
    digits = [_ALPHABET[(number >> (5 * place)) & 31] for place in reversed(range(_LENGTH))]
    return f"{prefix}-{''.join(digits)}"


def is_id(prefix: str, text: str) -> bool:
    """Return whether `text` has the form of an id that `new_id(prefix)` makes."""
    head, separator, tail = text.partition("-")
    return head == prefix and separator == "-" and len(tail) == _LENGTH and set(tail) <= set(_ALPHABET)
