"""OpenAI's error object and the headers of an error."""

from __future__ import annotations

import json

import grpc
import pytest

from services.common.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LorafleetError,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from services.gateway.errors import error_response, from_upstream
from services.gateway.job_request import FIELDS
from services.gateway.upstream_fields import in_http_terms


@pytest.mark.parametrize(
    ("error", "status", "kind", "should_retry"),
    [
        (InvalidArgument("invalid_value", "m"), 400, "invalid_request_error", None),
        (InvalidArgument("unsupported_media_type", "m"), 415, "invalid_request_error", None),
        (InvalidArgument("method_not_allowed", "m"), 405, "invalid_request_error", None),
        (FailedPrecondition("base_revision_mismatch", "m"), 400, "invalid_request_error", None),
        (FailedPrecondition("idempotency_key_reused", "m"), 422, "invalid_request_error", None),
        (Unauthenticated("invalid_api_key", "m"), 401, "authentication_error", None),
        (NotFound("model_not_found", "m"), 404, "invalid_request_error", None),
        (AlreadyExists("base_exists", "m"), 409, "invalid_request_error", "false"),
        (Aborted("alias_conflict", "m", final=True), 409, "invalid_request_error", "false"),
        (Aborted("request_in_progress", "m", retry_after_seconds=1), 409, "invalid_request_error", None),
        (ResourceExhausted("queue_full", "m", retry_after_seconds=1.2), 429, "rate_limit_error", None),
        (ResourceExhausted("too_large", "m"), 413, "invalid_request_error", None),
        (ResourceExhausted("config_too_large", "m"), 413, "invalid_request_error", None),
        (Unimplemented("unimplemented", "m"), 501, "server_error", "false"),
        (Unavailable("adapter_unavailable", "m"), 503, "server_error", None),
    ],
)
def test_status_type_and_retry(
    error: LorafleetError, status: int, kind: str, should_retry: str | None
) -> None:
    response = error_response(error)
    body = json.loads(bytes(response.body))["error"]
    assert response.status_code == status
    assert body == {"message": "m", "type": kind, "param": None, "code": error.reason}
    assert response.headers.get("x-should-retry") == should_retry
    if error.retry_after_seconds:
        assert response.headers["retry-after"] in ("1", "2")


async def test_a_failed_transport_tells_no_address() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/a.B/C", request_serializer=bytes)(b"")
    error = from_upstream(caught.value)
    assert (error.reason, error.retry_after_seconds) == ("unavailable", 1)
    assert "127.0.0.1" not in error.message


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("sampling.max_tokens", "max_tokens"),
        ("sampling.logit_bias[7]", "logit_bias[7]"),
        ("chat.messages[2].content", "messages[2].content"),
        ("messages[0]", "messages[0]"),
        ("text", "prompt"),
        ("texture", "texture"),
        ("model.adapter", "model"),
    ],
)
def test_generation_fields_have_http_names(field: str, expected: str) -> None:
    error = in_http_terms(InvalidArgument("invalid_value", "m", field=field))
    assert error.field == expected
    assert error.violations[0].field == expected


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("spec.rank", "method.supervised.lorafleet.rank"),
        ("spec.n_epochs", "method.supervised.hyperparameters.n_epochs"),
        ("adapter", "suffix"),
        ("training_file", "training_file"),
    ],
)
def test_job_fields_have_http_names(field: str, expected: str) -> None:
    assert in_http_terms(InvalidArgument("bad_hyperparameter", "m", field=field), FIELDS).field == expected


@pytest.mark.parametrize("reason", ["adapter_not_found", "version_not_found", "alias_not_found"])
def test_an_absent_model_is_one_error(reason: str) -> None:
    error = in_http_terms(NotFound(reason, "adapters/secret does not exist", field="ref"))
    assert (error.reason, error.field, "secret" in error.message) == ("model_not_found", "model", False)


def test_a_deleted_adapter_says_so() -> None:
    assert in_http_terms(NotFound("adapter_deleted", "m")).reason == "adapter_deleted"
