"""The tenant: every call of ours names one, in metadata that only our own services can set."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.common import names
from services.common.call_context import call_scope
from services.common.errors import Unauthenticated
from services.common.rpc.call import Call

TENANT_KEY = "lorafleet-tenant"


@asynccontextmanager
async def tenant_layer(call: Call) -> AsyncIterator[None]:
    """Set the tenant of the call.

    Raises:
        Unauthenticated: `tenant_missing`, where the metadata holds no tenant or several.
        InvalidArgument: `bad_tenant`, where the name is malformed.
    """
    if not call.is_ours:
        yield
        return
    given = call.values(TENANT_KEY)
    if len(given) != 1:
        raise Unauthenticated(
            "tenant_missing", f"metadata must hold exactly one {TENANT_KEY}", field=TENANT_KEY, limit=1
        )
    call.tenant = names.tenant_name(given[0], field=TENANT_KEY)
    with call_scope(tenant=call.tenant):
        yield
