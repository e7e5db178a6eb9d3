"""What is wrong with a training file, collected line by line."""

from __future__ import annotations

from services.common.errors import FieldViolation, InvalidArgument, capped

REPORTED_FAULTS = 20
_TEXT_LIMIT_CHARS = 160


class LineError(Exception):
    """One thing wrong with one line.

    Args:
        reason: stable lower_snake word.
        text: what is wrong and what to do about it.
        field: path inside the row, such as `messages[0].role`; empty for the whole line.
        column: 1-based column in characters, where it is known.
    """

    def __init__(self, reason: str, text: str, *, field: str = "", column: int | None = None) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text
        self.field = field
        self.column = column


class FaultList:
    """Gathers faults of one file; keeps the first `REPORTED_FAULTS` and counts the rest."""

    def __init__(self, file_field: str) -> None:
        """Start with no faults; `file_field` is the request field that named the file."""
        self._file_field = file_field
        self._violations: list[FieldViolation] = []
        self.count = 0

    def add(self, fault: LineError, line: int | None = None) -> None:
        """Add a fault of line `line` (1-based), or of the file as a whole."""
        self.count += 1
        if len(self._violations) >= REPORTED_FAULTS:
            return
        place = "" if line is None else f"line {line}"
        if fault.column is not None:
            place += f", column {fault.column}"
        path = self._file_field if line is None else f"{self._file_field}.lines[{line}]"
        path = f"{path}.{fault.field}" if fault.field else path
        text = f"{place}: {fault.text}" if place else fault.text
        self._violations.append(FieldViolation(path, capped(text, _TEXT_LIMIT_CHARS), fault.reason))

    def add_unlisted(self, count: int) -> None:
        """Count `count` more faults of a kind that is listed already."""
        self.count += count

    def raise_if_any(self) -> None:
        """Raise `InvalidArgument` (`invalid_dataset`) with the collected violations, or do nothing."""
        if not self.count:
            return
        more = self.count - len(self._violations)
        first = self._violations[0].description
        summary = f"{self.count} fault{'s' if self.count > 1 else ''} in {self._file_field}; first: {first}"
        if more:
            summary += f" ({more} more are not listed)"
        raise InvalidArgument(
            "invalid_dataset",
            summary,
            field=self._file_field,
            violations=self._violations,
            metadata={"fault_count": str(self.count), "first_reason": self._violations[0].reason},
        )
