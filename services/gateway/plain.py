"""Protobuf messages as plain JSON objects, by the names of the contract.

Unlike protobuf's own JSON mapping, 64-bit numbers stay numbers, enum values are lower-case words, times are
Unix seconds, and every field is there: null where it is absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")


def plain(message: Message) -> dict[str, Any]:
    """Return a message as an object; numbers that JSON cannot say become null."""
    # The implementation's own descriptor class, which the type stubs keep apart, has the same members.
    fields = cast("Sequence[FieldDescriptor]", message.DESCRIPTOR.fields)
    return {field.name: _field(message, field) for field in fields}


def enum_word(field: FieldDescriptor, number: int) -> str | None:
    """Return `exact_match` for TASK_METRIC_EXACT_MATCH, None for the unspecified value."""
    enum = field.enum_type
    assert enum is not None, "only enum fields have words"
    prefix = _WORD.sub("_", enum.name).upper() + "_"
    return enum.values_by_number[number].name.removeprefix(prefix).lower() if number else None


def _field(message: Message, field: FieldDescriptor) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        kind = field.message_type.fields_by_name["value"]
        return {key: _value(kind, item) for key, item in sorted(value.items())}
    if field.is_repeated:
        return [_value(field, item) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(field, value)


def _value(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.seconds
    if isinstance(value, Message):
        return plain(value)
    if field.enum_type is not None:
        return enum_word(field, value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
