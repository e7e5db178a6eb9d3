"""Pages of a list: sizes and signed tokens.

A token says where in one list to go on: the last item of the page before, signed together with the tenant,
the list and its filters. A token that was made up, changed, or taken to another list or tenant is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from services.common.errors import InvalidArgument

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_TOKEN_CHARS = 512

_SIGNATURE_BYTES = 16


class PageTokens:
    """Signs and checks the tokens of every list."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def after(self, last: str | int, *scope: str) -> str:
        """Return the token of what comes after `last` in the list `scope` (tenant, list, filters)."""
        position = str(last)
        signed = self._signature(position, scope) + position.encode("utf-8")
        return base64.urlsafe_b64encode(signed).decode("ascii").rstrip("=")

    def position(self, token: str, *scope: str) -> str:
        """Return what the last page ended with, "" for the first page. Raises `bad_page_token`."""
        if not token:
            return ""
        signed = _decoded(token)
        try:
            position = signed[_SIGNATURE_BYTES:].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _bad_token() from error
        if not hmac.compare_digest(signed[:_SIGNATURE_BYTES], self._signature(position, scope)):
            raise _bad_token()
        return position

    def number(self, token: str, *scope: str) -> int | None:
        """As `position`, for lists in the order of numbers; None for the first page."""
        text = self.position(token, *scope)
        return int(text) if text else None

    def _signature(self, position: str, scope: tuple[str, ...]) -> bytes:
        # Lengths in front, so that no two scopes are written alike.
        message = "".join(f"{len(part)}:{part}" for part in (*scope, position))
        return hmac.digest(self._secret, message.encode("utf-8"), hashlib.sha256)[:_SIGNATURE_BYTES]


def page_size(given: int) -> int:
    """Return the page size asked for; 0 means the default. Raises `InvalidArgument` (`bad_page_size`)."""
    if not 0 <= given <= MAX_PAGE_SIZE:
        message = f"page_size must be from 1 to {MAX_PAGE_SIZE}."
        raise InvalidArgument("bad_page_size", message, field="page_size", value=given, limit=MAX_PAGE_SIZE)
    return given or DEFAULT_PAGE_SIZE


def _decoded(token: str) -> bytes:
    if len(token) > MAX_TOKEN_CHARS:
        raise _bad_token()
    padding = "=" * (-len(token) % 4)
    try:
        decoded = base64.b64decode((token + padding).encode("ascii"), altchars=b"-_", validate=True)
    except (UnicodeError, binascii.Error) as error:
        raise _bad_token() from error
    return decoded


def _bad_token() -> InvalidArgument:
    return InvalidArgument("bad_page_token", "page_token is not one that this list gave.", field="page_token")
