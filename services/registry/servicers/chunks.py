"""Rules of byte streams that several calls share."""

from __future__ import annotations

from services.common.adapter_format.limits import MIB
from services.common.errors import InvalidArgument

MAX_CHUNK_BYTES = MIB


def check_chunk(data: bytes) -> None:
    """Refuse a chunk above the limit. Raises `InvalidArgument` (`chunk_too_large`)."""
    if len(data) > MAX_CHUNK_BYTES:
        message = f"A chunk holds at most {MAX_CHUNK_BYTES} bytes."
        raise InvalidArgument(
            "chunk_too_large", message, field="data", value=len(data), limit=MAX_CHUNK_BYTES
        )


def length_or_all(length: int) -> int | None:
    """Read the length of a range; 0 means to the end."""
    return length or None
