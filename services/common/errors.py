"""The one error tree of Lorafleet.

Every failure that a caller may see is raised, where the fact is known, as one of the classes below. The
class fixes the canonical code; `reason` is the stable lower_snake word that programs match on.
`services.common.status` turns an error into a gRPC status or an HTTP answer, and back.
"""

# The classes bear the names of the canonical codes, without a suffix.
# ruff: noqa: N818

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

_REASON = re.compile(r"[a-z][a-z0-9_]{0,62}")
VALUE_LIMIT_CHARS = 200
MESSAGE_LIMIT_CHARS = 2000


class Code(enum.Enum):
    """The canonical error codes of gRPC, without OK."""

    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One thing wrong with one field: its path, a sentence for people and a reason for programs."""

    field: str
    description: str
    reason: str = ""


class LorafleetError(Exception):
    """A failure with a canonical code and a stable reason.

    Args:
        reason: stable lower_snake word, at most 63 characters, e.g. `rank_too_large`.
        message: one or two plain sentences for people; capped at `MESSAGE_LIMIT_CHARS`.
        field: the request field at fault, as a path (`training.learning_rate`).
        value: the offending value; kept as its `repr`, capped at `VALUE_LIMIT_CHARS`.
        limit: what would have been accepted.
        violations: every bad field, where there may be several; from `field` and `message` when not given.
        resource: the name of the thing concerned (`adapters/billing`).
        retry_after_seconds: when a retry may succeed.
        final: true when a retry of the same call can never succeed although its code suggests one.
        metadata: further facts for programs; keys are lower_snake.
    """

    code: ClassVar[Code] = Code.UNKNOWN

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        field: str | None = None,
        value: object = None,
        limit: object = None,
        violations: Sequence[FieldViolation] = (),
        resource: str | None = None,
        retry_after_seconds: float | None = None,
        final: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        assert _REASON.fullmatch(reason), f"reason {reason!r} is not a lower_snake word"
        super().__init__(message)
        self.reason = reason
        self.message = capped(message, MESSAGE_LIMIT_CHARS)
        self.field = field
        self.value = None if value is None else capped(repr(value), VALUE_LIMIT_CHARS)
        self.limit = None if limit is None else capped(str(limit), VALUE_LIMIT_CHARS)
        self.violations = tuple(violations)
        if field is not None and not self.violations:
            self.violations = (FieldViolation(field, self.message, reason),)
        self.resource = resource
        self.retry_after_seconds = retry_after_seconds
        self.final = final
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class InvalidArgument(LorafleetError):
    """The request is wrong whatever the state of the system."""

    code = Code.INVALID_ARGUMENT


class FailedPrecondition(LorafleetError):
    """The request is well formed, but the state of the system does not allow it."""

    code = Code.FAILED_PRECONDITION


class OutOfRange(LorafleetError):
    """A position lies past the valid range."""

    code = Code.OUT_OF_RANGE


class NotFound(LorafleetError):
    """The named thing does not exist."""

    code = Code.NOT_FOUND


class AlreadyExists(LorafleetError):
    """The thing to be created exists, and differs."""

    code = Code.ALREADY_EXISTS


class ResourceExhausted(LorafleetError):
    """A quota, a limit or a size was exceeded."""

    code = Code.RESOURCE_EXHAUSTED


class PermissionDenied(LorafleetError):
    """The caller is known, and may not do this."""

    code = Code.PERMISSION_DENIED


class Unauthenticated(LorafleetError):
    """The caller is not known."""

    code = Code.UNAUTHENTICATED


class Unavailable(LorafleetError):
    """The service or something it needs cannot answer now; a retry may succeed."""

    code = Code.UNAVAILABLE


class DataLoss(LorafleetError):
    """Stored or received bytes are damaged."""

    code = Code.DATA_LOSS


class DeadlineExceeded(LorafleetError):
    """The time for this call ran out."""

    code = Code.DEADLINE_EXCEEDED


class Aborted(LorafleetError):
    """A concurrent change got in first; read again, then retry at a higher level."""

    code = Code.ABORTED


class Cancelled(LorafleetError):
    """The caller, or an operator, gave the work up."""

    code = Code.CANCELLED


class Internal(LorafleetError):
    """An invariant of ours is broken."""

    code = Code.INTERNAL


class Unimplemented(LorafleetError):
    """This server does not offer the call or the feature."""

    code = Code.UNIMPLEMENTED


class UnknownError(LorafleetError):
    """A peer failed without saying how."""

    code = Code.UNKNOWN


def capped(text: str, limit_chars: int) -> str:
    """Return `text`, cut to at most `limit_chars` characters with an ellipsis where it was cut."""
    return text if len(text) <= limit_chars else text[: limit_chars - 1] + "…"
