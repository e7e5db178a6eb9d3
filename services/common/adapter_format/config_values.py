"""Typed reading of single settings, and the errors that name them."""

from __future__ import annotations

import json
from typing import Any

from services.common.errors import InvalidArgument

FIELD = "config"

_MAX_TEXT_CHARS = 1024
_SHOWN_CHARS = 120


def text(config: dict[str, Any], key: str) -> str:
    """Return the text at `key`, empty where it is null or absent. Raises `bad_config`."""
    value = config.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _MAX_TEXT_CHARS:
        raise bad_value(key, value, f"text of at most {_MAX_TEXT_CHARS} characters")
    return value


def boolean(config: dict[str, Any], key: str) -> bool:
    """Return the truth value at `key`, false where it is absent. Raises `bad_config`."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise bad_value(key, value, "true or false")
    return value


def is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    """Whether `value` is in `allowed`, by value and by type: 0 == False, but a number is no boolean."""
    return any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in allowed)


def shown(value: object) -> str:
    """Return `value` as JSON, short enough for a message."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return json.dumps(value)[:_SHOWN_CHARS]


def bad_value(key: str, value: object, wanted: str) -> InvalidArgument:
    """The error for a value of the wrong type or size."""
    message = f"{key} is {shown(value)}; it must be {wanted}."
    return InvalidArgument("bad_config", message, field=f"{FIELD}.{key}", value=shown(value), limit=wanted)


def unsupported_field(key: str, value: object, why: str) -> InvalidArgument:
    """The error for a setting, or a form of one, that the format does not have."""
    name = key[:80]
    message = f"Setting {name!r} of adapter_config.json ({shown(value)}) is refused: {why}."
    return InvalidArgument("unsupported_field", message, field=f"{FIELD}.{name}", value=shown(value))


def unsupported_feature(key: str, value: object) -> InvalidArgument:
    """The error for a feature of PEFT that the format does not have."""
    message = f"{key} = {shown(value)} is not supported."
    return InvalidArgument("unsupported_feature", message, field=f"{FIELD}.{key}", value=shown(value))
