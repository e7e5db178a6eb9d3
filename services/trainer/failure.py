"""Why a job failed, in a form that can be stored and turned back into the error it was."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.common.errors import Code, FieldViolation, LorafleetError
from services.common.status import TABLE


@dataclass(frozen=True, slots=True)
class JobFailure:
    """An error as data."""

    code: str
    reason: str
    message: str
    violations: tuple[FieldViolation, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: LorafleetError) -> JobFailure:
        """Return `error` as data."""
        metadata = dict(error.metadata)
        for name in ("field", "value", "limit"):
            fact = getattr(error, name)
            if fact is not None:
                metadata.setdefault(name, fact)
        return cls(error.code.value, error.reason, error.message, error.violations, metadata)

    def to_error(self) -> LorafleetError:
        """Return the error that this was made of."""
        error_class = TABLE[Code(self.code)].error_class
        return error_class(self.reason, self.message, violations=self.violations, metadata=self.metadata)
