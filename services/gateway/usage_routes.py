"""`GET /v1/usage`: what the tenant has used."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from starlette.requests import Request

from services.common.errors import InvalidArgument
from services.gateway.auth import principal_of, requires
from services.gateway.state import gateway_of
from services.gateway.usage import Counts, Line, as_object

router = APIRouter(dependencies=[Depends(requires())])

MAX_DAYS = 92


@router.get("/v1/usage")
async def get_usage(
    request: Request,
    start: Annotated[date | None, Query(description="First day, UTC; today without.")] = None,
    end: Annotated[date | None, Query(description="Last day, UTC; today without.")] = None,
    group_by: Annotated[Literal["day", "key", "adapter", "none"], Query()] = "day",
) -> dict[str, Any]:
    """Sum requests and tokens of the tenant by day, key or adapter; days are UTC."""
    today = datetime.now(UTC).date()
    first, last = start or today, end or today
    days = (last - first).days + 1
    if not 1 <= days <= MAX_DAYS:
        raise InvalidArgument(
            "invalid_value", f"start to end must be 1 to {MAX_DAYS} days", field="start", value=str(first)
        )
    book, tenant = gateway_of(request).usage, principal_of(request).tenant
    sums: dict[str, Counts] = defaultdict(Counts)
    for day in (first + timedelta(number) for number in range(days)):
        for line, counts in (await asyncio.to_thread(book.read, tenant, day)).items():
            sums[_group(group_by, day, line)].add(counts)
    return {
        "object": "list",
        "start": first.isoformat(),
        "end": last.isoformat(),
        "data": [
            {"object": "usage", group_by if group_by != "none" else "group": group, **as_object(counts)}
            for group, counts in sorted(sums.items())
        ],
    }


def _group(group_by: str, day: date, line: Line) -> str:
    match group_by:
        case "day":
            return day.isoformat()
        case "key":
            return line.key_id
        case "adapter":
            return line.adapter or "base"
        case _:
            return "all"
