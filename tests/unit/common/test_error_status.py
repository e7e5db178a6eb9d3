"""Errors to `google.rpc.Status` and back, and the table of codes."""

from __future__ import annotations

import grpc
import hypothesis
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.common import errors
from services.common.errors import Code, FieldViolation, LorafleetError
from services.common.status import (
    DETAILS_LIMIT_BYTES,
    STATUS_DETAILS_KEY,
    TABLE,
    from_rpc_error,
    grpc_code,
    http_status,
    is_ours,
    openai_type,
    to_status,
)


def over_the_wire(status: status_pb2.Status, code: Code) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata((STATUS_DETAILS_KEY, status.SerializeToString()))
    return grpc.aio.AioRpcError(grpc_code(code), grpc.aio.Metadata(), trailing, details=status.message)


def round_trip(error: LorafleetError) -> LorafleetError:
    return from_rpc_error(over_the_wire(to_status(error), error.code))


def detail_names(error: LorafleetError) -> set[str]:
    return {detail.type_url.rpartition(".")[2] for detail in to_status(error).details}


def test_every_code_has_one_row_and_one_class() -> None:
    assert set(TABLE) == set(Code)
    assert {code.value for code in Code} == {code.name for code in grpc.StatusCode} - {"OK"}
    for code, row in TABLE.items():
        assert row.error_class.code is code


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (errors.InvalidArgument("bad_name", "m"), 400, "invalid_request_error"),
        (errors.OutOfRange("past_end", "m"), 400, "invalid_request_error"),
        (errors.FailedPrecondition("base_mismatch", "m"), 400, "invalid_request_error"),
        (errors.Unauthenticated("bad_key", "m"), 401, "authentication_error"),
        (errors.PermissionDenied("not_yours", "m"), 403, "permission_error"),
        (errors.NotFound("no_adapter", "m"), 404, "invalid_request_error"),
        (errors.AlreadyExists("exists", "m"), 409, "invalid_request_error"),
        (errors.Aborted("alias_moved", "m"), 409, "invalid_request_error"),
        (errors.ResourceExhausted("queue_full", "m"), 429, "rate_limit_error"),
        (errors.ResourceExhausted("file_too_large", "m"), 413, "invalid_request_error"),
        (errors.Cancelled("cancelled", "m"), 499, "invalid_request_error"),
        (errors.Internal("internal", "m"), 500, "server_error"),
        (errors.DataLoss("damaged", "m"), 500, "server_error"),
        (errors.Unimplemented("not_here", "m"), 501, "server_error"),
        (errors.Unavailable("store_unavailable", "m"), 503, "server_error"),
        (errors.DeadlineExceeded("deadline_exceeded", "m"), 504, "server_error"),
    ],
)
def test_http_status_and_openai_type(error: LorafleetError, status: int, kind: str) -> None:
    assert (http_status(error), openai_type(error)) == (status, kind)


@given(
    code=st.sampled_from(list(Code)),
    reason=st.from_regex(r"[a-z][a-z0-9_]{0,62}", fullmatch=True),
    message=st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace").decode()),
    field=st.none() | st.just("lora.rank"),
    value=st.none() | st.integers() | st.text(max_size=20),
    resource=st.none() | st.just("adapters/billing"),
    retry_after_seconds=st.none() | st.integers(0, 3600).map(float),
    final=st.booleans(),
)
def test_an_error_survives_the_wire(
    code: Code,
    reason: str,
    message: str,
    field: str | None,
    value: object,
    resource: str | None,
    retry_after_seconds: float | None,
    final: bool,
) -> None:
    error = TABLE[code].error_class(
        reason,
        message,
        field=field,
        value=value,
        limit="64" if field else None,
        resource=resource,
        retry_after_seconds=retry_after_seconds,
        final=final,
        metadata={"adapter": "billing"},
    )
    back = round_trip(error)
    assert type(back) is type(error)
    assert vars(back) == vars(error)


WORDS = st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True)
TEXTS = st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace").decode())


@hypothesis.settings(max_examples=20)
@given(
    reason=WORDS,
    message=TEXTS,
    violations=st.lists(st.builds(FieldViolation, field=WORDS, description=TEXTS, reason=WORDS), max_size=4),
    resource=st.none() | st.builds("{}/{}".format, WORDS, WORDS),
    retry_after_seconds=st.none() | st.integers(0, 10**6).map(lambda n: n / 1000),
    metadata=st.dictionaries(st.from_regex(r"x_[a-z]{1,8}", fullmatch=True), TEXTS, max_size=3),
)
@pytest.mark.parametrize("code", Code)
def test_every_code_survives_the_wire_with_every_kind_of_detail(
    code: Code,
    reason: str,
    message: str,
    violations: list[FieldViolation],
    resource: str | None,
    retry_after_seconds: float | None,
    metadata: dict[str, str],
) -> None:
    error = TABLE[code].error_class(
        reason,
        message,
        violations=violations,
        resource=resource,
        retry_after_seconds=retry_after_seconds,
        metadata=metadata,
    )
    back = round_trip(error)
    assert type(back) is type(error)
    assert vars(back) == vars(error)
    wanted = {
        "ErrorInfo": True,
        "BadRequest": bool(violations),
        "PreconditionFailure": code is Code.FAILED_PRECONDITION,
        "QuotaFailure": code is Code.RESOURCE_EXHAUSTED,
        "ResourceInfo": resource is not None,
        "RetryInfo": retry_after_seconds is not None,
    }
    assert detail_names(error) == {name for name, is_there in wanted.items() if is_there}


def test_details_fit_the_error() -> None:
    assert detail_names(errors.InvalidArgument("bad_name", "m")) == {"ErrorInfo"}
    assert detail_names(errors.InvalidArgument("bad_name", "m", field="f")) == {"ErrorInfo", "BadRequest"}
    assert detail_names(errors.FailedPrecondition("p", "m", resource="bases/x")) == {
        "ErrorInfo",
        "PreconditionFailure",
        "ResourceInfo",
    }
    assert detail_names(errors.ResourceExhausted("q", "m", retry_after_seconds=1)) == {
        "ErrorInfo",
        "QuotaFailure",
        "RetryInfo",
    }


@pytest.mark.parametrize("letter", ["a", "ß", "漢", "\n"])
def test_the_largest_error_fits_into_the_metadata_of_a_default_client(letter: str) -> None:
    violations = [FieldViolation(f"rows[{n}]", letter * 300, "bad_row") for n in range(5000)]
    error = errors.InvalidArgument("bad_rows", letter * 5000, violations=violations)
    status = to_status(error)
    assert status.ByteSize() <= DETAILS_LIMIT_BYTES
    back = round_trip(error)
    assert back.reason == "bad_rows"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert int(info.metadata["violations_left_out"]) == 5000 - len(back.violations)


def test_metadata_that_does_not_fit_is_dropped_but_never_the_reason() -> None:
    error = errors.NotFound("no_adapter", "m", metadata={"huge": "x" * 10_000})
    assert to_status(error).ByteSize() <= DETAILS_LIMIT_BYTES
    assert round_trip(error).reason == "no_adapter"


def test_a_status_without_our_details_gives_the_code_as_reason() -> None:
    bare = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details="connection refused"
    )
    error = from_rpc_error(bare)
    assert isinstance(error, errors.Unavailable)
    assert (error.reason, error.message) == ("unavailable", "connection refused")
    assert not is_ours(bare)


@pytest.mark.parametrize(("reason", "domain"), [("no_adapter", "example.com"), ("No Adapter!", "lorafleet")])
def test_details_of_strangers_are_not_believed(reason: str, domain: str) -> None:
    status = status_pb2.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="m")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
    wire = over_the_wire(status, Code.NOT_FOUND)
    assert from_rpc_error(wire).reason == "not_found"
    assert not is_ours(wire)


def test_damaged_details_are_no_details() -> None:
    trailing = grpc.aio.Metadata((STATUS_DETAILS_KEY, b"\xff\xff\xff"))
    wire = grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), trailing, details="not there")
    assert from_rpc_error(wire).reason == "not_found"
    # A status that contradicts the call it came with is not believed either.
    other = to_status(errors.Internal("internal", "not there"))
    wire = over_the_wire(other, Code.NOT_FOUND)
    assert isinstance(from_rpc_error(wire), errors.NotFound)
    assert from_rpc_error(wire).reason == "not_found"


def test_values_and_messages_are_capped() -> None:
    error = errors.InvalidArgument("bad_name", "m" * 5000, field="name", value="x" * 5000, limit="y" * 5000)
    assert error.value is not None
    assert error.limit is not None
    assert (len(error.message), len(error.value), len(error.limit)) == (2000, 200, 200)
    assert str(error).startswith("bad_name: mmm")


@pytest.mark.skipif(not __debug__, reason="our own asserts are not run under python -O")
def test_a_reason_that_is_no_word_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        errors.NotFound("Not a reason", "m")
