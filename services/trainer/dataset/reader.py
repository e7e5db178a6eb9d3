"""From a file to rows, or to the list of everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.trainer.dataset.faults import FaultList, LineError
from services.trainer.dataset.lines import LINE_LIMIT_BYTES, LineReader
from services.trainer.dataset.rows import Row, Schema, parse_row, schema_of


@dataclass(frozen=True, slots=True)
class Dataset:
    """The rows of one file.

    Attributes:
        rows: in the order of the file.
        digest: `sha256:<hex>` of the file's bytes.
    """

    schema: Schema
    rows: tuple[Row, ...]
    digest: str

    @property
    def duplicate_rows(self) -> int:
        """Rows that repeat an earlier one."""
        return len(self.rows) - len({row.digest for row in self.rows})


def read_dataset(
    path: Path,
    *,
    field: str = "training_file",
    schema: Schema | None = None,
    line_limit_bytes: int = LINE_LIMIT_BYTES,
) -> Dataset:
    """Return the rows of the JSON-lines file at `path`.

    A byte-order mark, CRLF, blank lines and a last line without an end are accepted.

    Args:
        field: request field that named the file, for the error.
        schema: what the rows must follow; that of the first good row when None.
        line_limit_bytes: longest line.

    Raises:
        InvalidArgument: `invalid_dataset`; the violations name line, column, field and remedy; reasons
            `empty_dataset`, `bad_json_line`, `duplicate_key`, `bad_number`, `lone_surrogate`, `not_utf8`,
            `line_too_large`, `unknown_schema`, `mixed_schema`, `unknown_field`, `bad_messages`, `bad_prompt`,
            `bad_completion`.
    """
    reader = LineReader(path, line_limit_bytes=line_limit_bytes)
    faults = FaultList(field)
    rows: list[Row] = []
    first_line: dict[Schema, int] = {}
    wanted = schema
    for number, value in reader.lines():
        try:
            if isinstance(value, LineError):
                raise value
            found = schema_of(value)
            first_line.setdefault(found, number)
            wanted = wanted or found
            if found is not wanted:
                raise _mixed(found, wanted, first_line)
            rows.append(parse_row(value, found, number))
        except LineError as fault:
            faults.add(fault, number)
    if not rows and not faults.count:
        faults.add(LineError("empty_dataset", "the file holds no rows"))
    faults.raise_if_any()
    assert wanted is not None, "a row without a fault has a schema"
    return Dataset(wanted, tuple(rows), reader.digest)


def overlap_rows(training: Sequence[Row], validation: Sequence[Row]) -> int:
    """Return how many rows of `validation` are also in `training`."""
    trained = {row.digest for row in training}
    return sum(row.digest in trained for row in validation)


def _mixed(found: Schema, wanted: Schema, first_line: dict[Schema, int]) -> LineError:
    known = f" as in line {first_line[wanted]}" if wanted in first_line else ""
    return LineError(
        "mixed_schema", f"the row is {found} (first in line {first_line[found]}); use {wanted}{known}"
    )
