"""JSON schemas of the contract's messages as `plain` shows them."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.timestamp_pb2 import Timestamp

from services.gateway.plain import enum_word

JsonSchema = dict[str, Any]

_NUMBERS = frozenset({FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT})


def message_schema(descriptor: Descriptor, **more: JsonSchema) -> JsonSchema:
    """Return the schema of a message; every field is there. `more` are keys beside its fields."""
    properties = {**more, **{field.name: _field_schema(field) for field in descriptor.fields}}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _field_schema(field: FieldDescriptor) -> JsonSchema:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        values = _value_schema(entry.fields_by_name["value"])
        return {"type": "object", "additionalProperties": values}
    if field.is_repeated:
        return {"type": "array", "items": _value_schema(field)}
    schema = _value_schema(field)
    return _or_null(schema) if field.has_presence else schema


def _value_schema(field: FieldDescriptor) -> JsonSchema:
    if field.message_type is not None:
        if field.message_type.full_name == Timestamp.DESCRIPTOR.full_name:
            return {"type": "integer", "description": "Unix seconds"}
        return message_schema(field.message_type)
    if field.enum_type is not None:
        words = [enum_word(field, number) for number in field.enum_type.values_by_number]
        return {"enum": words}
    if field.cpp_type in _NUMBERS:
        return {"type": ["number", "null"]}
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return {"type": "string"}
    return {"type": "boolean" if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL else "integer"}


def _or_null(schema: JsonSchema) -> JsonSchema:
    return {"anyOf": [schema, {"type": "null"}]}
