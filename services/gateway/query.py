"""Query parameters: what a route does not know is refused by name, as in bodies."""

from __future__ import annotations

from fastapi.routing import APIRoute
from starlette.requests import Request

from services.common.errors import InvalidArgument, capped

# Given as `metadata[key]=value`, one for each key.
_KEYED = frozenset({"metadata"})
_NAME_LIMIT_CHARS = 80


def check_query(request: Request) -> None:
    """Raise `InvalidArgument` (`unsupported_parameter`) for a parameter that the route does not take."""
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    known = {field.alias for field in route.dependant.query_params}
    for name in request.query_params:
        base, bracket, _ = name.partition("[")
        if name not in known and not (bracket and base in _KEYED & known):
            raise InvalidArgument(
                "unsupported_parameter",
                f"{capped(name, _NAME_LIMIT_CHARS)} is not supported here",
                field=name,
            )
