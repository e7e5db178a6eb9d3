"""The names that callers may give to things, checked by full match, and the adapter reference.

A name that passes holds no slash, no dot pair and no upper case, so it can stand in a log line, a metric
label or an object key without escaping. Each check returns its argument, so that it can be used in an
expression.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from services.common.errors import InvalidArgument

_ADAPTER = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_BASE = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_ALIAS = re.compile(r"[a-z](?:[a-z0-9-]{0,30}[a-z0-9])?")
_TENANT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

_DOTTED_RULE: Final = "1-64 of a-z 0-9 . _ -, first and last a letter or digit, no '..'"
_ALIAS_RULE: Final = "1-32 of a-z 0-9 -, first a letter, last a letter or digit"
_TENANT_RULE: Final = "1-32 of a-z 0-9 -, first and last a letter or digit"
_DIGEST_RULE: Final = "sha256: and 64 lower-case hex digits"
_REFERENCE_RULE: Final = "name, name:VERSION, name@ALIAS or name@sha256:DIGEST"


def adapter_name(text: str, *, field: str = "adapter") -> str:
    """Return `text` if it may name an adapter; raise `InvalidArgument` (`bad_name`) otherwise."""
    return _dotted(_ADAPTER, text, field)


def base_name(text: str, *, field: str = "base_model") -> str:
    """Return `text` if it may name a base model; raise `InvalidArgument` (`bad_name`) otherwise."""
    return _dotted(_BASE, text, field)


def alias_name(text: str, *, field: str = "alias") -> str:
    """Return `text` if it may name an alias; raise `InvalidArgument` (`bad_alias`) otherwise."""
    if not _ALIAS.fullmatch(text):
        raise InvalidArgument(
            "bad_alias", f"{field} must be {_ALIAS_RULE}", field=field, value=text, limit=_ALIAS_RULE
        )
    return text


def tenant_name(text: str, *, field: str = "tenant") -> str:
    """Return `text` if it may name a tenant; raise `InvalidArgument` (`bad_tenant`) otherwise."""
    if not _TENANT.fullmatch(text):
        raise InvalidArgument(
            "bad_tenant", f"{field} must be {_TENANT_RULE}", field=field, value=text, limit=_TENANT_RULE
        )
    return text


def digest(text: str, *, field: str = "digest") -> str:
    """Return `text` if it is `sha256:<64 hex>`; raise `InvalidArgument` (`bad_digest`) otherwise."""
    if not _DIGEST.fullmatch(text):
        raise InvalidArgument(
            "bad_digest", f"{field} must be {_DIGEST_RULE}", field=field, value=text, limit=_DIGEST_RULE
        )
    return text


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What a caller calls an adapter: its name and at most one of version number, alias and digest.

    With none of the three it means the newest published version. `str()` gives the reference back.
    """

    name: str
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str, *, field: str = "adapter") -> AdapterRef:
        """Parse `name`, `name:3`, `name@prod` or `name@sha256:<64 hex>`.

        Raises:
            InvalidArgument: `bad_name`, `bad_version`, `bad_alias` or `bad_digest`, naming `field`.
        """
        name, at, selector = text.partition("@")
        if at:
            adapter_name(name, field=field)
            if selector.startswith("sha256:"):
                return cls(name, digest=digest(selector, field=field))
            return cls(name, alias=alias_name(selector, field=field))
        name, colon, number = text.partition(":")
        adapter_name(name, field=field)
        if not colon:
            return cls(name)
        if not _VERSION.fullmatch(number):
            raise InvalidArgument(
                "bad_version",
                f"{field}: a version is a whole number from 1 to 999999999, without leading zeros",
                field=field,
                value=text,
                limit=_REFERENCE_RULE,
            )
        return cls(name, version=int(number))

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}:{self.version}"
        selector = self.alias or self.digest
        return f"{self.name}@{selector}" if selector else self.name


def _dotted(pattern: re.Pattern[str], text: str, field: str) -> str:
    if not pattern.fullmatch(text) or ".." in text:
        raise InvalidArgument(
            "bad_name", f"{field} must be {_DOTTED_RULE}", field=field, value=text, limit=_DOTTED_RULE
        )
    return text
