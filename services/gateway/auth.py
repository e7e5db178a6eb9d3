"""Who may use a route: a dependency that every router but health carries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request

from services.common.call_context import call_scope
from services.common.errors import PermissionDenied
from services.gateway.keys import Principal, Scope
from services.gateway.query import check_query
from services.gateway.revocation import key_check
from services.gateway.state import gateway_of

_SCOPE = "scope"


def requires(scope: Scope | None = None) -> Callable[[Request], AsyncIterator[None]]:
    """Return the dependency that admits valid keys with `scope` (any valid key when None).

    What runs inside acts for the key's tenant: every call to a service carries it.

    Raises:
        Unauthenticated: `invalid_api_key`.
        PermissionDenied: `permission_denied`.
        InvalidArgument: `unsupported_parameter`, for a query parameter that the route does not take.
    """

    async def admit(request: Request) -> AsyncIterator[None]:
        keys = gateway_of(request).keys
        key = bearer_token(request.headers.getlist("authorization"))
        principal = await keys.authenticate(key)
        request.state.tenant = principal.tenant
        request.state.principal = principal
        request.state.key_check = key_check(keys, key)
        if scope is not None and scope not in principal.scopes:
            raise PermissionDenied("permission_denied", f"this API key may not be used for {scope.value}")
        check_query(request)
        with call_scope(tenant=principal.tenant):
            yield

    setattr(admit, _SCOPE, scope)
    return admit


def is_admission(dependency: Callable[..., Any]) -> bool:
    """Return whether a dependency is one of `requires`."""
    return hasattr(dependency, _SCOPE)


def scope_of(dependency: Callable[..., Any]) -> Scope | None:
    """Return the scope that a dependency of `requires` asks for; None for any valid key."""
    scope: Scope | None = getattr(dependency, _SCOPE)
    return scope


def principal_of(request: Request) -> Principal:
    """Return who makes a request that was admitted."""
    principal: Principal = request.state.principal
    return principal


def bearer_token(headers: Sequence[str]) -> str | None:
    """Return the one bearer token in the `authorization` headers of a request; two headers count as none."""
    if len(headers) != 1:
        return None
    scheme, _, token = headers[0].partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None
