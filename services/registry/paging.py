"""Pages of a list: sizes and tokens.

A token names the last item of the page before it. It is opaque, not secret: it only says where in the
caller's own list to go on.
"""

from __future__ import annotations

import base64
import binascii
import re

from services.common.errors import InvalidArgument

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

_POSITION = re.compile(r"[a-z0-9._-]{1,128}")


def page_size(given: int) -> int:
    """Return the page size asked for; 0 means the default. Raises `InvalidArgument` (`bad_page_size`)."""
    if not 0 <= given <= MAX_PAGE_SIZE:
        message = f"page_size must be from 1 to {MAX_PAGE_SIZE}."
        raise InvalidArgument("bad_page_size", message, field="page_size", value=given, limit=MAX_PAGE_SIZE)
    return given or DEFAULT_PAGE_SIZE


def position(token: str) -> str:
    """Return what the last page ended with, "" for the first page. Raises `bad_page_token`."""
    if not token:
        return ""
    try:
        text = base64.urlsafe_b64decode(token.encode("ascii")).decode("ascii")
    except (UnicodeError, binascii.Error) as error:
        raise _bad_token() from error
    if not _POSITION.fullmatch(text):
        raise _bad_token()
    return text


def number_position(token: str) -> int | None:
    """As `position`, for lists in the order of numbers; None for the first page."""
    text = position(token)
    if not text:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise _bad_token()
    return int(text)


def token_after(last: str | int) -> str:
    """Return the token of the page after the one that ends with `last`."""
    return base64.urlsafe_b64encode(str(last).encode("ascii")).decode("ascii")


def _bad_token() -> InvalidArgument:
    return InvalidArgument("bad_page_token", "page_token is not one that this list gave.", field="page_token")
