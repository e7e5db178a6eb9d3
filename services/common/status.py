"""The one table between our codes, gRPC and HTTP statuses, and errors on the wire in both directions.

On the wire an error is a `google.rpc.Status` in the trailing metadata. `ErrorInfo` is always there, with
`reason` and the domain `lorafleet`; `BadRequest`, `PreconditionFailure`, `QuotaFailure`, `ResourceInfo` and
`RetryInfo` where they fit. Nothing is ever read out of a message text.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.common import errors
from services.common.errors import Code, FieldViolation, LorafleetError

DOMAIN = "lorafleet"
STATUS_DETAILS_KEY = "grpc-status-details-bin"

# gRPC clients refuse trailing metadata above 8 KiB by default. The details travel in base 64 and the message
# is sent once more, percent-encoded, so these two bounds keep the whole below 7 KiB.
DETAILS_LIMIT_BYTES = 3584
MESSAGE_LIMIT_ENCODED_BYTES = 1536

_REASON = re.compile(r"[a-z][a-z0-9_]{0,62}")
_OWN_METADATA = ("field", "value", "limit", "final", "violations_left_out")


class Row(NamedTuple):
    """One line of the table: the class to raise, the HTTP status and the `type` of OpenAI's error object."""

    error_class: type[LorafleetError]
    http_status: int
    openai_type: str


TABLE: dict[Code, Row] = {
    Code.CANCELLED: Row(errors.Cancelled, 499, "invalid_request_error"),
    Code.UNKNOWN: Row(errors.UnknownError, 500, "server_error"),
    Code.INVALID_ARGUMENT: Row(errors.InvalidArgument, 400, "invalid_request_error"),
    Code.DEADLINE_EXCEEDED: Row(errors.DeadlineExceeded, 504, "server_error"),
    Code.NOT_FOUND: Row(errors.NotFound, 404, "invalid_request_error"),
    Code.ALREADY_EXISTS: Row(errors.AlreadyExists, 409, "invalid_request_error"),
    Code.PERMISSION_DENIED: Row(errors.PermissionDenied, 403, "permission_error"),
    Code.RESOURCE_EXHAUSTED: Row(errors.ResourceExhausted, 429, "rate_limit_error"),
    Code.FAILED_PRECONDITION: Row(errors.FailedPrecondition, 400, "invalid_request_error"),
    Code.ABORTED: Row(errors.Aborted, 409, "invalid_request_error"),
    Code.OUT_OF_RANGE: Row(errors.OutOfRange, 400, "invalid_request_error"),
    Code.UNIMPLEMENTED: Row(errors.Unimplemented, 501, "server_error"),
    Code.INTERNAL: Row(errors.Internal, 500, "server_error"),
    Code.UNAVAILABLE: Row(errors.Unavailable, 503, "server_error"),
    Code.DATA_LOSS: Row(errors.DataLoss, 500, "server_error"),
    Code.UNAUTHENTICATED: Row(errors.Unauthenticated, 401, "authentication_error"),
}


def grpc_code(code: Code) -> grpc.StatusCode:
    """Return the gRPC status for one of our codes."""
    return grpc.StatusCode[code.value]


def http_status(error: LorafleetError) -> int:
    """Return the HTTP status of an error: its code's, or 413 where something is too large to be taken."""
    if error.code is Code.RESOURCE_EXHAUSTED and error.reason.endswith("too_large"):
        return 413
    return TABLE[error.code].http_status


def openai_type(error: LorafleetError) -> str:
    """Return the `type` of OpenAI's error object for an error."""
    return "invalid_request_error" if http_status(error) == 413 else TABLE[error.code].openai_type


def to_status(error: LorafleetError) -> status_pb2.Status:
    """Return the error as a `google.rpc.Status` of at most `DETAILS_LIMIT_BYTES`.

    Violations that do not fit are left out from the end; `ErrorInfo.metadata["violations_left_out"]` counts
    them.
    """
    message = _fitting_message(error.message)
    violations = list(error.violations)
    while True:
        status = _status(error, message, violations, left_out=len(error.violations) - len(violations))
        if status.ByteSize() <= DETAILS_LIMIT_BYTES:
            return status
        if not violations:
            break
        # A tenth at a time: few rounds however many there are.
        del violations[-(len(violations) // 10 + 1) :]
    status = status_pb2.Status(code=grpc_code(error.code).value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    return status


def from_rpc_error(error: grpc.RpcError) -> LorafleetError:
    """Return what a peer reported as an error of ours.

    Takes `grpc.aio.AioRpcError` and the errors of synchronous calls. Without our details in the trailing
    metadata (an unreachable peer, a foreign server) the reason is the code in lower case, e.g. `unavailable`.
    """
    call = _call(error)
    error_class = TABLE[Code[call.code().name]].error_class
    ours = _our_details(call)
    if ours is None:
        message = call.details() or f"the peer ended the call with {call.code().name}"
        return error_class(call.code().name.lower(), message)
    status, info = ours
    bad_request, resource = error_details_pb2.BadRequest(), error_details_pb2.ResourceInfo()
    retry = error_details_pb2.RetryInfo()
    _unpack(status, bad_request)
    _unpack(status, resource)
    has_retry = _unpack(status, retry)
    result = error_class(
        info.reason,
        status.message,
        field=info.metadata.get("field"),
        violations=[FieldViolation(v.field, v.description, v.reason) for v in bad_request.field_violations],
        resource=resource.resource_name or None,
        retry_after_seconds=retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
        final=info.metadata.get("final") == "true",
        metadata={key: value for key, value in info.metadata.items() if key not in _OWN_METADATA},
    )
    # Set past the constructor, which would take the `repr` of what is one already.
    result.value, result.limit = info.metadata.get("value"), info.metadata.get("limit")
    return result


def is_ours(error: grpc.RpcError) -> bool:
    """Return whether the error of a call carries our details, so that its reason is one of ours."""
    return _our_details(_call(error)) is not None


def _call(error: grpc.RpcError) -> grpc.Call | grpc.aio.AioRpcError:
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError), "only errors of calls carry a status"
    return error


def _our_details(
    call: grpc.Call | grpc.aio.AioRpcError,
) -> tuple[status_pb2.Status, error_details_pb2.ErrorInfo] | None:
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):
        return None
    info = error_details_pb2.ErrorInfo()
    if status is None or not _unpack(status, info):
        return None
    return (status, info) if info.domain == DOMAIN and _REASON.fullmatch(info.reason) else None


def _status(
    error: LorafleetError, message: str, violations: list[FieldViolation], left_out: int
) -> status_pb2.Status:
    status = status_pb2.Status(code=grpc_code(error.code).value[0], message=message)
    facts = {"field": error.field, "value": error.value, "limit": error.limit}
    metadata = {key: value for key, value in facts.items() if value is not None} | error.metadata
    if error.final:
        metadata["final"] = "true"
    if left_out:
        metadata["violations_left_out"] = str(left_out)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    )
    if violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in violations:
            bad_request.field_violations.add(
                field=violation.field, description=violation.description, reason=violation.reason
            )
        status.details.add().Pack(bad_request)
    subject = error.resource or error.field or ""
    if error.code is Code.FAILED_PRECONDITION:
        precondition = error_details_pb2.PreconditionFailure()
        precondition.violations.add(type=error.reason, subject=subject, description=message)
        status.details.add().Pack(precondition)
    if error.code is Code.RESOURCE_EXHAUSTED:
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject=subject, description=message)
        status.details.add().Pack(quota)
    if error.resource:
        resource_type = error.resource.split("/", 1)[0]
        status.details.add().Pack(
            error_details_pb2.ResourceInfo(
                resource_type=resource_type, resource_name=error.resource, description=message
            )
        )
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _fitting_message(message: str) -> str:
    """Cut a message so that its percent-encoded form, as headers carry it, keeps within its bound."""
    while len(quote(message, safe=" !\"#$&'()*+,-./:;<=>?@[]^_`{|}~")) > MESSAGE_LIMIT_ENCODED_BYTES:
        message = message[: len(message) * 9 // 10].rstrip("…") + "…"
    # A half surrogate pair cannot be sent.
    return message.encode("utf-8", "replace").decode("utf-8")


def _unpack(status: status_pb2.Status, into: Message) -> bool:
    """Fill `into` from the first detail of its type and return whether there was one."""
    for detail in status.details:
        if detail.Is(into.DESCRIPTOR):
            try:
                return bool(detail.Unpack(into))
            except DecodeError:
                return False
    return False
