"""`/health` and `/readyz`: the only routes without a key."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from services.gateway.state import gateway_of

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """Answer while the process lives."""
    return {"status": "ok"}


@router.get("/readyz")
async def ready(request: Request) -> JSONResponse:
    """Answer 200 when every service behind this one serves, else 503; with the state of each."""
    services = await gateway_of(request).upstream.health()
    is_ready = all(state == "serving" for state in services.values())
    return JSONResponse(
        {"status": "ready" if is_ready else "not_ready", "services": services},
        status_code=200 if is_ready else 503,
    )
