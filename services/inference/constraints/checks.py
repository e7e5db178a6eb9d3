"""What is refused of a constraint before anything is compiled: by its size and by its form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from services.common.adapter_format.strict_json import StrictJsonError, parse_object
from services.common.errors import InvalidArgument
from services.inference.constraints.grammar import ConstraintKind
from services.inference.constraints.regex_form import RegexFormError, check_form

MAX_SCHEMA_BYTES = 256 * 1024
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_NODES = 10_000
MAX_ENUM_VALUES = 1_000
MAX_COUNT = 10_000
MAX_REGEX_CHARS = 8_192
MAX_GRAMMAR_BYTES = 64 * 1024

_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
# Keys that hold data, not schemas.
_DATA = frozenset({"const", "default", "examples", "enum"})
# Keys that map names to schemas.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_MAX_REF_STEPS = 64


def check(kind: ConstraintKind, text: str) -> None:
    """Refuse what is too large to compile, or refers to what is not here.

    Raises:
        InvalidArgument: `schema_too_complex`, `unsupported_regex` or `unsupported_grammar`, with the limit.
    """
    match kind:
        case ConstraintKind.JSON_SCHEMA:
            _check_schema(text)
        case ConstraintKind.REGEX:
            _check_regex(text, "sampling.regex")
        case ConstraintKind.GRAMMAR:
            size = len(text.encode())
            if not 1 <= size <= MAX_GRAMMAR_BYTES:
                raise _refused(kind, "sampling.grammar", size, f"1 to {MAX_GRAMMAR_BYTES} bytes")


def _check_schema(text: str) -> None:
    size = len(text.encode())
    if not 1 <= size <= MAX_SCHEMA_BYTES:
        raise _schema_refused("", size, f"1 to {MAX_SCHEMA_BYTES} bytes")
    try:
        schema = parse_object(text.encode(), max_depth=MAX_SCHEMA_DEPTH)
    except StrictJsonError as error:
        raise _schema_refused(
            "", str(error), f"a JSON object at most {MAX_SCHEMA_DEPTH} levels deep"
        ) from error
    enum_values = 0
    for number, (path, node) in enumerate(_nodes(schema, "")):
        if number >= MAX_SCHEMA_NODES:
            raise _schema_refused("", f"more than {MAX_SCHEMA_NODES}", f"at most {MAX_SCHEMA_NODES} schemas")
        enum = node.get("enum")
        if isinstance(enum, list):
            enum_values += len(enum)
            if enum_values > MAX_ENUM_VALUES:
                raise _schema_refused(f"{path}.enum", len(enum), f"{MAX_ENUM_VALUES} values in all")
        for key in _COUNTS:
            count = node.get(key)
            if isinstance(count, int | float) and not isinstance(count, bool) and not count <= MAX_COUNT:
                raise _schema_refused(f"{path}.{key}", count, f"at most {MAX_COUNT}")
        if isinstance(node.get("pattern"), str):
            _check_regex(node["pattern"], f"sampling.json_schema{path}.pattern")
        if isinstance(node.get("patternProperties"), dict):
            for pattern in node["patternProperties"]:
                _check_regex(pattern, f"sampling.json_schema{path}.patternProperties")
        _check_ref(schema, node, path)


def _nodes(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every schema within a schema, with the path to it."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _nodes(item, f"{path}[{index}]")
    elif isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            if key in _NAMED and isinstance(value, dict):
                for name, item in value.items():
                    yield from _nodes(item, f"{path}.{key}.{name}")
            elif key not in _DATA:
                yield from _nodes(value, f"{path}.{key}")


def _check_ref(schema: dict[str, Any], node: dict[str, Any], path: str) -> None:
    """Refuse references to elsewhere, and those that lead back to themselves with nothing in between."""
    seen: set[str] = set()
    while isinstance(ref := node.get("$ref"), str):
        if not ref.startswith("#"):
            raise _schema_refused(f"{path}.$ref", ref[:100], "references within the schema, from # on")
        if ref in seen or len(seen) > _MAX_REF_STEPS:
            raise _schema_refused(f"{path}.$ref", ref[:100], "references that lead to a schema")
        seen.add(ref)
        target = _target(schema, ref)
        if not isinstance(target, dict):
            return
        node = target


def _target(schema: Any, ref: str) -> Any:
    node = schema
    for part in ref.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(name)
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node


def _check_regex(text: str, field: str) -> None:
    if not 1 <= len(text) <= MAX_REGEX_CHARS:
        raise _refused(ConstraintKind.REGEX, field, len(text), f"1 to {MAX_REGEX_CHARS} characters")
    try:
        check_form(text, max_repeats=MAX_COUNT)
    except RegexFormError as error:
        raise _refused(ConstraintKind.REGEX, field, error, error.limit) from error


def _schema_refused(path: str, value: object, limit: str) -> InvalidArgument:
    return _refused(ConstraintKind.JSON_SCHEMA, f"sampling.json_schema{path}"[:200], value, limit)


def _refused(kind: ConstraintKind, field: str, value: object, limit: str) -> InvalidArgument:
    return InvalidArgument(
        kind.reason,
        f"{field} cannot be used: {value}; allowed: {limit}.",
        field=field,
        value=value,
        limit=limit,
    )
