"""Errors of LoRAX's routes: status, and the word that its client tells them apart by."""

from __future__ import annotations

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from services.common.errors import (
    Aborted,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    LorafleetError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from services.gateway.lorax.errors import LoraxRoute


async def answer_to(error: Exception) -> httpx.Response:
    router = APIRouter(route_class=LoraxRoute)

    @router.get("/")
    async def fail() -> None:
        raise error

    app = FastAPI()
    app.include_router(router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        return await http.get("/")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidArgument("invalid_value", "no"), 422, "validation"),
        (InvalidArgument("unsupported_media_type", "no"), 415, "validation"),
        (ResourceExhausted("too_large", "no"), 413, "validation"),
        (ResourceExhausted("queue_full", "no"), 429, "overloaded"),
        (Unavailable("draining", "no"), 503, "overloaded"),
        (Unavailable("generation_aborted", "no"), 503, "incomplete_generation"),
        (Internal("internal", "no"), 500, "generation"),
        (NotFound("model_not_found", "no"), 404, "model_not_found"),
        (DeadlineExceeded("deadline_exceeded", "no"), 504, "deadline_exceeded"),
        (Aborted("alias_conflict", "no"), 409, "alias_conflict"),
    ],
)
async def test_known_errors(error: LorafleetError, status: int, kind: str) -> None:
    answer = await answer_to(error)
    assert (answer.status_code, answer.json()) == (status, {"error": "no", "error_type": kind})


async def test_an_unexpected_exception_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    answer = await answer_to(ValueError("a secret"))
    assert (answer.status_code, answer.json()["error_type"]) == (500, "generation")
    assert "a secret" not in answer.text
    assert "a secret" in caplog.text
