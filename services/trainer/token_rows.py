"""Token rows on the disk: written once, read by number; memory holds a few numbers per row."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from services.trainer.dataset import Row, Schema, read_row
from services.trainer.tokens import EncodedRow, TokenRow

_IDS, _MASK = "ids.int32", "supervised.bool"


class TokenWriter:
    """Appends rows of one training file to a folder."""

    def __init__(self, folder: Path, source: Path) -> None:
        """Write to the new folder `folder` the tokens of the file `source`, which stays where it is."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._source = source
        self._ids = (folder / _IDS).open("wb")
        self._mask = (folder / _MASK).open("wb")
        self._ends = array("q", [0])
        self._prompt_lengths = array("i")
        self._lines = array("q")
        self._offsets = array("q")

    def append(self, row: EncodedRow, line: int, offset_bytes: int) -> None:
        """Add a row that was made of line `line`, which begins at byte `offset_bytes`."""
        self._ids.write(row.ids.tobytes())
        self._mask.write(row.supervised.tobytes())
        self._ends.append(self._ends[-1] + len(row.ids))
        self._prompt_lengths.append(row.prompt_length)
        self._lines.append(line)
        self._offsets.append(offset_bytes)

    def close(self) -> None:
        """Close the files; a second time does nothing."""
        self._ids.close()
        self._mask.close()

    def finish(self, schema: Schema) -> TokenRows:
        """Close the files and return the rows in them."""
        self.close()
        ends = np.frombuffer(self._ends, dtype=np.int64)
        return TokenRows(
            _TokenFile(
                np.memmap(self._folder / _IDS, dtype=np.int32, mode="r"),
                np.memmap(self._folder / _MASK, dtype=np.bool_, mode="r"),
                ends,
                np.frombuffer(self._prompt_lengths, dtype=np.int32),
                np.frombuffer(self._lines, dtype=np.int64),
                np.frombuffer(self._offsets, dtype=np.int64),
                self._source,
                schema,
            ),
            np.arange(len(ends) - 1, dtype=np.int64),
        )


class _TokenFile:
    """What the rows of one training file share."""

    def __init__(
        self,
        ids: NDArray[np.int32],
        mask: NDArray[np.bool_],
        ends: NDArray[np.int64],
        prompt_lengths: NDArray[np.int32],
        lines: NDArray[np.int64],
        offsets: NDArray[np.int64],
        source: Path,
        schema: Schema,
    ) -> None:
        self.ids = ids
        self.mask = mask
        self.ends = ends
        self.prompt_lengths = prompt_lengths
        self.lines = lines
        self.offsets = offsets
        self.source = source
        self.schema = schema

    def row(self, index: int) -> TokenRow:
        start, end = self.ends[index], self.ends[index + 1]
        return TokenRow(
            tuple(self.ids[start:end].tolist()),
            tuple(self.mask[start:end].tolist()),
            int(self.prompt_lengths[index]),
            self.source_row(index),
        )

    def source_row(self, index: int) -> Row:
        return read_row(self.source, int(self.offsets[index]), int(self.lines[index]), self.schema)


class TokenRows(Sequence[TokenRow]):
    """Rows in an order of their own over one training file; a slice is a view as well.

    Attributes:
        lengths: int64 [rows], tokens of each row, without reading any.
    """

    def __init__(self, file: _TokenFile, indices: NDArray[np.int64]) -> None:
        self._file = file
        self._indices = indices
        self.lengths: NDArray[np.int64] = file.ends[indices + 1] - file.ends[indices]

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> TokenRows: ...
    def __getitem__(self, index: int | slice) -> TokenRow | TokenRows:
        if isinstance(index, slice):
            return TokenRows(self._file, self._indices[index])
        return self._file.row(int(self._indices[index]))

    def take(self, indices: NDArray[np.int64]) -> TokenRows:
        """Return the rows of these numbers, in this order."""
        return TokenRows(self._file, self._indices[indices])
