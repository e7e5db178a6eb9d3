"""Page sizes and page tokens of the list calls."""

from __future__ import annotations

import base64
import binascii

from services.common.errors import InvalidArgument

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


def page_size(given: int) -> int:
    """Return the number of items to list; raise `InvalidArgument` (`bad_page_size`) beyond 0 to 1,000."""
    if not 0 <= given <= MAX_PAGE_SIZE:
        raise InvalidArgument(
            "bad_page_size",
            f"page_size is {given}; it must be 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}",
            field="page_size",
            value=given,
            limit=f"0 to {MAX_PAGE_SIZE}",
        )
    return given or DEFAULT_PAGE_SIZE


def encode_token(kind: str, position: str) -> str:
    """Return the token of the page that begins behind `position` in a list of this kind."""
    return base64.urlsafe_b64encode(f"{kind} {position}".encode("ascii")).decode("ascii")


def decode_token(kind: str, token: str) -> str | None:
    """Return the position in a token, None for the empty token of the first page.

    Raises:
        InvalidArgument: `bad_page_token`, for a text that `encode_token` did not make for this kind.
    """
    if not token:
        return None
    try:
        text = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, UnicodeError) as error:
        raise _bad_token(token) from error
    head, _, position = text.partition(" ")
    if head != kind or not position:
        raise _bad_token(token)
    return position


def decode_number(kind: str, token: str) -> int | None:
    """Return the number in a token, as `decode_token`."""
    position = decode_token(kind, token)
    if position is None:
        return None
    if not position.isdigit() or len(position) > 9:
        raise _bad_token(token)
    return int(position)


def _bad_token(token: str) -> InvalidArgument:
    return InvalidArgument(
        "bad_page_token", "page_token is not of this list", field="page_token", value=token
    )
