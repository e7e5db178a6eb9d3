"""`GET /openapi.json`: the document."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute, iter_route_contexts
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute

from services.gateway.auth import is_admission
from services.gateway.document.answers import ANSWERS, BYTES, EVENTS, JSON, Answer, Named, Page
from services.gateway.document.messages import JsonSchema
from services.gateway.document.own_shapes import LoraxError
from services.gateway.document.shapes import Error
from services.gateway.json_body import Body, body_class_of
from services.gateway.lorax.errors import LoraxRoute

router = APIRouter()

_SCHEME = "key"
_REF = "#/components/schemas/{model}"


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> JSONResponse:
    """Return the document. It tells nothing of this installation, so it needs no key."""
    state = request.app.state
    if getattr(state, "document", None) is None:
        state.document = await asyncio.to_thread(document, request.app.routes)
    return JSONResponse(state.document)


def document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """Return the OpenAPI document of an application's routes."""
    shown = [route for route in api_routes(routes) if route.include_in_schema]
    made = get_openapi(
        title="Lorafleet",
        version=version("lorafleet"),
        # The first that can tell what the events of a stream are.
        openapi_version="3.2.0",
        routes=shown,
    )
    components = _Components(shown)
    for route in shown:
        for method in route.methods or ():
            operation = made["paths"][route.path_format][method.lower()]
            operation |= _operation(route, components)
    made["components"] = {
        "schemas": components.schemas,
        "securitySchemes": {
            _SCHEME: {"type": "http", "scheme": "bearer", "description": "An API key, `lf-...`."}
        },
    }
    return made


def api_routes(routes: Sequence[BaseRoute]) -> list[APIRoute]:
    """Return the routes of an application and of all routers in it."""
    found = [context.original_route for context in iter_route_contexts(routes)]
    return [route for route in found if isinstance(route, APIRoute)]


class _Components:
    """The schemas that the operations refer to."""

    def __init__(self, routes: Sequence[APIRoute]) -> None:
        answers = [ANSWERS[route.endpoint] for route in routes]
        shapes: list[Any] = [shape for answer in answers for shape in (answer.body, answer.events)]
        shapes = [shape for shape in shapes if shape is not None and not isinstance(shape, Named | Page)]
        shapes += [body for body in map(body_class, routes) if body is not None]
        # One call for all, so that two of one name get two names.
        self._shapes = list(dict.fromkeys([*shapes, Error, LoraxError]))
        self._read, definitions = TypeAdapter.json_schemas(
            [(number, "validation", TypeAdapter(shape)) for number, shape in enumerate(self._shapes)],
            ref_template=_REF,
        )
        self.schemas: dict[str, JsonSchema] = definitions["$defs"]

    def schema(self, shape: Any) -> JsonSchema:
        """Return the schema of a shape; what has a name is referred to by it."""
        if isinstance(shape, Page):
            return _list_schema(self.schema(shape.item), is_paged=shape.is_paged)
        if isinstance(shape, Named):
            self.schemas[shape.name] = shape.schema
            return {"$ref": _REF.format(model=shape.name)}
        return self._read[self._shapes.index(shape), "validation"]


def _operation(route: APIRoute, components: _Components) -> dict[str, Any]:
    """Return what FastAPI cannot know of an operation: body, answers and key."""
    answer, body = ANSWERS[route.endpoint], body_class(route)
    operation: dict[str, Any] = {"responses": _responses(route, answer, components)}
    if body is not None:
        operation["requestBody"] = _content(JSON, components.schema(body))
    elif answer.form is not None:
        operation["requestBody"] = _content("multipart/form-data", _form_schema(answer.form))
    if needs_key(route):
        operation["security"] = [{_SCHEME: []}]
    return operation


def _responses(route: APIRoute, answer: Answer, components: _Components) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if answer.body is not None:
        content[JSON] = {"schema": components.schema(answer.body)}
    if answer.events is not None:
        content[EVENTS] = {"itemSchema": _event_schema(components.schema(answer.events))}
    if answer.is_bytes:
        content[BYTES] = {"schema": {"type": "string", "format": "binary"}}
    good = {"description": "All is well.", "content": content}
    error = components.schema(LoraxError if isinstance(route, LoraxRoute) else Error)
    refusal = {"content": {JSON: {"schema": error}}}
    return {
        "200": good,
        **{str(code): {**good, "description": "Not all is well."} for code in answer.also},
        "4XX": {"description": "The request is at fault.", **refusal},
        "5XX": {"description": "The server is at fault, or cannot answer now.", **refusal},
    }


def _content(media_type: str, schema: JsonSchema) -> dict[str, Any]:
    return {"required": True, "content": {media_type: {"schema": schema}}}


def _event_schema(item: JsonSchema) -> JsonSchema:
    """Return the schema of one event of a stream. What ends a stream, `[DONE]`, is not JSON."""
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": item}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _form_schema(form: dict[str, bool]) -> JsonSchema:
    """Return the schema of a form; its files and texts look alike in a document."""
    return {
        "type": "object",
        "properties": {name: {"type": "string", "format": "binary"} for name in form},
        "required": [name for name, is_required in form.items() if is_required],
        "additionalProperties": False,
    }


def _list_schema(item: JsonSchema, *, is_paged: bool) -> JsonSchema:
    properties: JsonSchema = {"object": {"const": "list"}, "data": {"type": "array", "items": item}}
    if is_paged:
        id_or_null = {"type": ["string", "null"]}
        properties |= {"first_id": id_or_null, "last_id": id_or_null, "has_more": {"type": "boolean"}}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def body_class(route: APIRoute) -> type[Body] | None:
    """Return what a route reads its JSON body as, by its dependency."""
    return next((body_class_of(call) for call in dependencies_of(route) if body_class_of(call)), None)


def needs_key(route: APIRoute) -> bool:
    """Return whether a route has the dependency that asks for a key."""
    return any(is_admission(call) for call in dependencies_of(route))


def dependencies_of(route: APIRoute) -> Iterator[Callable[..., Any]]:
    """Yield what is called before a route's own function, in whatever depth."""
    return _calls(route.dependant)


def _calls(dependant: Dependant) -> Iterator[Callable[..., Any]]:
    for dependency in dependant.dependencies:
        if dependency.call is not None:
            yield dependency.call
        yield from _calls(dependency)
