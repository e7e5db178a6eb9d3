"""The HTTP reference, from the OpenAPI document of the gateway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from docs.tooling.markdown import anchor, table
from services.common.store import open_store
from services.gateway.app import create_app
from services.gateway.config import GatewaySettings
from services.gateway.document.document import document

Json = Mapping[str, Any]
# Nothing is opened before the application starts; it is only asked to describe itself.
_STORE_URL = Path("/nowhere").as_uri()
_PEPPER = SecretStr("describes itself alone")


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document of the HTTP API."""
    settings = GatewaySettings(store_url=_STORE_URL, key_pepper=_PEPPER)
    return document(create_app(settings, open_store(_STORE_URL)).routes)


def http_page(openapi: Json) -> str:
    """Return the Markdown of the page for an OpenAPI 3 document."""
    schemas = openapi.get("components", {}).get("schemas", {})
    lines = ["# HTTP API", "", *_introduction(openapi)]
    for path, methods in sorted(openapi["paths"].items()):
        for method, operation in methods.items():
            lines += _operation(method.upper(), path, operation)
    lines += ["## Schemas", ""]
    for name, schema in sorted(schemas.items()):
        lines += _schema(name, schema)
    return "\n".join(lines)


def _introduction(openapi: Json) -> Iterator[str]:
    info = openapi["info"]
    version = f"{info['title']} {info['version']}, OpenAPI {openapi['openapi']}"
    yield from (f"{version}. A gateway tells it itself: `GET /openapi.json`.", "")
    for scheme in openapi["components"]["securitySchemes"].values():
        yield from (f"`Authorization: Bearer KEY`. {scheme['description']}", "")
    if info.get("description"):
        yield from (info["description"], "")


def _operation(method: str, path: str, operation: Json) -> Iterator[str]:
    yield from (f"## {method} {path}", "")
    yield from (operation.get("description") or operation.get("summary", ""), "")
    parameters = [
        (found["name"], found["in"], _kind(found["schema"]), _said(found))
        for found in operation.get("parameters", ())
    ]
    if parameters:
        yield from table(("parameter", "in", "type", ""), parameters)
    if not operation.get("security"):
        yield from ("Needs no key.", "")
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        yield from (f"Body, `{media_type}`: {_kind(content['schema'])}", "")
    rows = [
        (code, _answer(answer), answer.get("description", ""))
        for code, answer in operation["responses"].items()
    ]
    yield from table(("status", "answer", ""), rows)


def _answer(answer: Json) -> str:
    kinds = {
        media_type: _kind(content["schema"])
        if "schema" in content
        else f"stream of {_kind(content['itemSchema'])}"
        for media_type, content in answer.get("content", {}).items()
    }
    return ", ".join(f"`{media_type}`: {kind}" for media_type, kind in kinds.items())


def _schema(name: str, schema: Json) -> Iterator[str]:
    yield from (f"### {name}", "", schema.get("description", ""), "")
    required = set(schema.get("required", ()))
    rows = [
        (field, _kind(value) + (", required" if field in required else ""), _said(value))
        for field, value in schema.get("properties", {}).items()
    ]
    if rows:
        yield from table(("field", "type", ""), rows)
    else:
        yield from (_kind(schema), "")


def _kind(schema: Json) -> str:
    """Return a schema's type in words, with links to named ones."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{anchor(name)})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_kind(part) for part in schema[key]))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"array of {_kind(schema.get('items', {}))}"
    if kind == "object":
        return _object_kind(schema)
    if "contentSchema" in schema:
        return f"JSON of {_kind(schema['contentSchema'])}"
    return str(kind) + _range(schema)


def _object_kind(schema: Json) -> str:
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    required = set(schema.get("required", ()))
    fields = [
        f"`{name}`{'' if name in required else ' (optional)'}: {_kind(value)}"
        for name, value in schema.get("properties", {}).items()
    ]
    return f"object of {'; '.join(fields)}" if fields else "object"


def _range(schema: Json) -> str:
    low = {"": schema.get("minimum", schema.get("minLength")), "above ": schema.get("exclusiveMinimum")}
    high = {"to ": schema.get("maximum", schema.get("maxLength")), "below ": schema.get("exclusiveMaximum")}
    bounds = [f"{word}{bound:,}" for word, bound in (*low.items(), *high.items()) if bound is not None]
    unit = " characters" if schema.get("type") == "string" else ""
    return f" ({' '.join(bounds)}{unit})" if bounds else ""


def _said(found: Json) -> str:
    schema = found.get("schema", found)
    default = schema.get("default")
    ending = f" Default: `{default}`." if default is not None else ""
    return str(found.get("description", "")) + ending
