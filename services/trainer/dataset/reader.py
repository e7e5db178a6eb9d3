"""From a file to rows, or to the list of everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from services.trainer.dataset.columns import column_of
from services.trainer.dataset.faults import FaultList, LineError
from services.trainer.dataset.lines import LINE_LIMIT_BYTES, Line, LineReader, parse_line
from services.trainer.dataset.rows import Row
from services.trainer.dataset.schemas import Schema, parse_row, schema_of


class DatasetReader:
    """Reads one JSON-lines file once, row by row, and gathers what is wrong with it.

    A byte-order mark, CRLF, blank lines and a last line without an end are accepted. However large the file
    is, one line of it is held at a time.
    """

    def __init__(
        self,
        path: Path,
        *,
        field: str = "training_file",
        schema: Schema | None = None,
        line_limit_bytes: int = LINE_LIMIT_BYTES,
    ) -> None:
        """Read the file at `path`.

        Args:
            path: the file.
            field: request field that named the file, for the error.
            schema: what the rows must follow; that of the first row when None.
            line_limit_bytes: longest line.
        """
        self.faults = FaultList(field)
        self._lines = LineReader(path, line_limit_bytes=line_limit_bytes)
        self._schema = schema
        self._first_line: dict[Schema, int] = {}
        self._num_rows = 0

    @property
    def schema(self) -> Schema:
        """What the rows follow; known once a row was read."""
        assert self._schema is not None, "a file without a fault has a row, and a row has a schema"
        return self._schema

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the file's bytes, once all rows were read."""
        return self._lines.digest

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield every good row with the byte that its line begins at; bad ones go to `faults`."""
        for line in self._lines.lines():
            try:
                row = self._row(line)
            except LineError as fault:
                self.faults.add(fault, line.number)
                continue
            self._num_rows += 1
            yield line.offset_bytes, row

    def finish(self) -> None:
        """Raise for what is wrong with the file, once all rows were read.

        Raises:
            InvalidArgument: `invalid_dataset`; the violations name line, column, field and remedy; reasons
                `empty_dataset`, `bad_json_line`, `duplicate_key`, `bad_number`, `lone_surrogate`, `not_utf8`,
                `line_too_large`, `unknown_schema`, `mixed_schema`, `unknown_field`, `bad_messages`,
                `bad_tools`, and `bad_` before the name of a field that must be text.
        """
        if not self._num_rows and not self.faults.count:
            self.faults.add(LineError("empty_dataset", "the file holds no rows; write one object per line"))
        self.faults.raise_if_any()

    def _row(self, line: Line) -> Row:
        if isinstance(line.value, LineError):
            raise line.value
        try:
            found = schema_of(line.value)
            self._first_line.setdefault(found, line.number)
            self._schema = self._schema or found
            if found is not self._schema:
                raise self._mixed(found)
            return parse_row(line.value, found, line.number)
        except LineError as fault:
            if fault.column is None and fault.field:
                fault.column = column_of(line.text, fault.field)
            raise

    def _mixed(self, found: Schema) -> LineError:
        first = self._first_line
        known = f" as in line {first[self.schema]}" if self.schema in first else ""
        return LineError(
            "mixed_schema", f"the row is {found} (first in line {first[found]}); use {self.schema}{known}"
        )


def read_row(path: Path, offset_bytes: int, number: int, schema: Schema) -> Row:
    """Return the row of line `number`, at `offset_bytes` of a file that was read without fault before."""
    with path.open("rb") as file:
        file.seek(offset_bytes)
        line = parse_line(file.readline(), number, offset_bytes)
    assert line is not None, "a row's line is not blank"
    assert not isinstance(line.value, LineError), "the line was read without fault before"
    return parse_row(line.value, schema, number)
