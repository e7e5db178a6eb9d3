"""The facts of a call: scopes nest, tasks inherit them, a deadline only ever comes nearer."""

from __future__ import annotations

import asyncio

import pytest

from services.common.call_context import (
    call_scope,
    current_tenant,
    remaining_seconds,
    request_id,
    tenant_or_none,
)
from services.common.errors import Unauthenticated


def test_scopes_nest_and_end() -> None:
    with call_scope(request_id="outer", tenant="acme", timeout_seconds=10):
        with call_scope(request_id="inner", timeout_seconds=1):
            assert (request_id(), current_tenant()) == ("inner", "acme")
            assert remaining_seconds() == pytest.approx(1, abs=0.5)
        with call_scope(timeout_seconds=100):
            assert remaining_seconds() == pytest.approx(10, abs=1)
        assert request_id() == "outer"
    assert (request_id(), tenant_or_none(), remaining_seconds()) == (None, None, None)
    with pytest.raises(Unauthenticated, match="tenant_missing"):
        current_tenant()


def test_time_left_is_never_negative() -> None:
    with call_scope(timeout_seconds=-5):
        assert remaining_seconds() == 0


async def test_tasks_inherit_the_scope_they_were_made_in() -> None:
    async def tenant_later() -> str:
        await asyncio.sleep(0.01)
        return current_tenant()

    tasks = []
    for tenant in ("acme", "globex"):
        with call_scope(tenant=tenant):
            tasks.append(asyncio.create_task(tenant_later()))
    assert await asyncio.gather(*tasks) == ["acme", "globex"]
