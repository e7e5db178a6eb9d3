"""JSON request bodies: bounded, strict, and with every unknown field refused by name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.requests import ClientDisconnect, Request

from services.common.adapter_format.strict_json import StrictJsonError, parse_object
from services.common.errors import FieldViolation, InvalidArgument, ResourceExhausted
from services.gateway.errors import ClientGoneError
from services.gateway.state import gateway_of

MAX_DEPTH = 32
# Bounds the work of parsing: more commas and brackets than any prompt within the body limit has use for.
MAX_SEPARATORS = 250_000
_FIELD_ERROR = "field_error"
_BODY_CLASS = "body_class"

BodyT = TypeVar("BodyT", bound="Body")


class Body(BaseModel):
    """A request body. Types are taken as they come, null means absent only where a field says so."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    unsupported: ClassVar[frozenset[str]] = frozenset()
    """Fields of OpenAI's API that this server cannot honour; null, which asks for nothing, is taken."""

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: item for key, item in data.items() if item is not None or key not in cls.unsupported}


def json_body(body_class: type[BodyT]) -> Callable[[Request], Awaitable[BodyT]]:
    """Return the dependency that reads, parses and checks the body of a request.

    Raises:
        InvalidArgument: `unsupported_media_type` (415), `invalid_json`, `unsupported_parameter`,
            `missing_required_parameter` or `invalid_value`.
        ResourceExhausted: `too_large` (413).
    """

    async def read(request: Request) -> BodyT:
        require_media_type(request, "application/json")
        data = await read_bounded(request, gateway_of(request).settings.max_body_bytes)
        return check(body_class, parse(data))

    setattr(read, _BODY_CLASS, body_class)
    return read


def body_class_of(dependency: Callable[..., Any]) -> type[Body] | None:
    """Return what a dependency of `json_body` reads a body as; None for any other."""
    body_class: type[Body] | None = getattr(dependency, _BODY_CLASS, None)
    return body_class


def require_media_type(request: Request, wanted: str) -> None:
    """Raise `unsupported_media_type` unless the body is declared as `wanted`."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != wanted:
        raise InvalidArgument("unsupported_media_type", f"send the body as {wanted}", field="content-type")


async def read_bounded(request: Request, limit_bytes: int) -> bytes:
    """Return the body; stop reading as soon as it is, or is declared, larger than the limit."""
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit_bytes:
        raise _too_large(limit_bytes)
    chunks: list[bytes] = []
    size_bytes = 0
    try:
        async for chunk in request.stream():
            size_bytes += len(chunk)
            if size_bytes > limit_bytes:
                raise _too_large(limit_bytes)
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return b"".join(chunks)


def parse(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`; raise `invalid_json`, or `too_large` for one of too many parts."""
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_SEPARATORS:
        raise ResourceExhausted("too_large", "the body has too many parts", limit=MAX_SEPARATORS)
    try:
        return parse_object(data, max_depth=MAX_DEPTH)
    except StrictJsonError as error:
        raise InvalidArgument("invalid_json", f"the body cannot be read: {error}") from error


def check(body_class: type[BodyT], data: dict[str, Any]) -> BodyT:
    """Return `data` as a `body_class`; raise `InvalidArgument` with every violation."""
    try:
        return body_class.model_validate(data)
    except ValidationError as error:
        ranked = sorted(
            ((_violation(detail, data), detail["type"]) for detail in error.errors(include_url=False)),
            key=lambda pair: _explains_less(*pair),
        )
        violations = [violation for violation, _ in ranked]
        first = violations[0]
        raise InvalidArgument(
            first.reason, first.description, field=first.field or None, violations=violations
        ) from error


def field_error(field: str, message: str, *, reason: str = "invalid_value") -> PydanticCustomError:
    """Return the error of a validator that sees several fields, to be raised with the one at fault."""
    return PydanticCustomError(
        _FIELD_ERROR, "{message}", {"field": field, "message": message, "reason": reason}
    )


def _violation(detail: ErrorDetails, data: dict[str, Any]) -> FieldViolation:
    field = _path(detail["loc"], data)
    if detail["type"] == "extra_forbidden":
        return FieldViolation(field, f"{field} is not supported here", "unsupported_parameter")
    if detail["type"] == "missing":
        return FieldViolation(field, f"{field} is required", "missing_required_parameter")
    if detail["type"] == _FIELD_ERROR:
        context = detail["ctx"]
        inner = f"{field}.{context['field']}" if field else context["field"]
        return FieldViolation(inner, context["message"], context["reason"])
    said = detail["msg"].removeprefix("Value error, ")
    return FieldViolation(field, f"{field}: {said}" if field else said, "invalid_value")


def _explains_less(violation: FieldViolation, kind: str) -> tuple[bool, bool, int]:
    """Sort a field that does not belong here first.

    Of the errors of a union the nearest comes first: one of a member that has the right type, or the deepest.
    """
    depth = violation.field.count("[") + violation.field.count(".")
    return violation.reason != "unsupported_parameter", kind.endswith("_type"), -depth


def _path(location: Sequence[int | str], data: Any) -> str:
    """Return `messages[2].content` for a location; what pydantic adds for unions is left out."""
    path = ""
    for place, part in enumerate(location):
        if isinstance(data, list) and isinstance(part, int) and part < len(data):
            path, data = f"{path}[{part}]", data[part]
        elif isinstance(data, dict) and isinstance(part, str):
            is_last = place == len(location) - 1
            if part not in data and not is_last:
                continue
            path, data = f"{path}.{part}" if path else part, data.get(part)
    return path


def _too_large(limit_bytes: int) -> ResourceExhausted:
    return ResourceExhausted(
        "too_large", f"the body is larger than {limit_bytes} bytes", limit=limit_bytes, final=True
    )
