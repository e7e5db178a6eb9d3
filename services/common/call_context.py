"""What one call carries along, in context variables: its id, its tenant and the time it has left.

The server interceptor sets them for each call, the client interceptors send them on, and the log formatter
writes them into each line. Work that does not begin with a gRPC call (an HTTP request, a job) opens a
`call_scope`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from services.common.errors import Unauthenticated

_request_id: ContextVar[str | None] = ContextVar("lorafleet_request_id", default=None)
_tenant: ContextVar[str | None] = ContextVar("lorafleet_tenant", default=None)
_deadline: ContextVar[float | None] = ContextVar("lorafleet_deadline", default=None)


def request_id() -> str | None:
    """Return the id of the present call, or None outside any call."""
    return _request_id.get()


def tenant_or_none() -> str | None:
    """Return the tenant of the present call, or None where it has none."""
    return _tenant.get()


def current_tenant() -> str:
    """Return the tenant of the present call; raise `Unauthenticated` (`tenant_missing`) where it has none."""
    tenant = _tenant.get()
    if tenant is None:
        raise Unauthenticated("tenant_missing", "the call names no tenant", field="lorafleet-tenant")
    return tenant


def remaining_seconds() -> float | None:
    """Return the time left to the present call, at least 0, or None where it has no deadline."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


@contextmanager
def call_scope(
    *, request_id: str | None = None, tenant: str | None = None, timeout_seconds: float | None = None
) -> Iterator[None]:
    """Set what is given for the body; the rest stays as it was. A deadline is only ever brought forward."""
    resets = []
    if request_id is not None:
        resets.append((_request_id, _request_id.set(request_id)))
    if tenant is not None:
        resets.append((_tenant, _tenant.set(tenant)))
    left = remaining_seconds()
    deadline_token = None
    if timeout_seconds is not None and (left is None or timeout_seconds < left):
        deadline_token = _deadline.set(time.monotonic() + timeout_seconds)
    try:
        yield
    finally:
        if deadline_token is not None:
            _deadline.reset(deadline_token)
        for variable, token in reversed(resets):
            variable.reset(token)
