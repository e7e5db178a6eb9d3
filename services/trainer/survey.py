"""One pass over a training file: every row checked, encoded, counted, and kept on the disk where wanted."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.common.prompts import PromptEncoder
from services.trainer.dataset import DatasetReader, LineError, Row, Schema
from services.trainer.dataset.faults import REPORTED_FAULTS
from services.trainer.dataset.rows import ConversationRow
from services.trainer.spec import OverlongPolicy, TrainingSpec
from services.trainer.token_rows import TokenRows, TokenWriter
from services.trainer.tokens import EncodedRow, RowEncoder, text_size

# Rows that are encoded at once: enough to use all cores, few enough to hear a cancel.
BATCH_ROWS = 256
BATCH_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class Survey:
    """What one file holds, after the overlong policy.

    Attributes:
        lengths: int32 [rows], tokens of each row.
        supervised: int32 [rows], tokens of each row that count in the loss.
        row_digests: uint64 [rows], equal where rows are.
        prompt_digests: uint64 [rows], equal where what the model is given is.
        max_row_tokens: longest row before the policy.
        overlong_rows: rows that were longer than allowed.
        truncated_rows: of those, the ones that were cut.
        rows_without_stop: rows whose answer does not end with a token that ends generation.
        prefix_mismatch_rows: rows that do not begin with what serving sends for their last answer.
        last_turn_only_rows: rows of which the template lets only the last answer be learned.
        rows: the rows themselves, where they were kept.
    """

    schema: Schema
    digest: str
    lengths: NDArray[np.int32]
    supervised: NDArray[np.int32]
    row_digests: NDArray[np.uint64]
    prompt_digests: NDArray[np.uint64]
    max_row_tokens: int
    overlong_rows: int
    truncated_rows: int
    rows_without_stop: int
    prefix_mismatch_rows: int
    last_turn_only_rows: int
    rows: TokenRows | None

    @property
    def has_answers(self) -> bool:
        """Whether rows ask for something that can be scored."""
        return self.schema is not Schema.TEXT


def survey(
    path: Path,
    encoder: PromptEncoder,
    spec: TrainingSpec,
    *,
    field: str,
    schema: Schema | None = None,
    folder: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> Survey:
    """Return what the file at `path` holds. Memory grows by some tens of bytes per row.

    Args:
        path: a file of JSON lines.
        encoder: the base's tokenizer and chat template.
        spec: what is learned, and what happens to long rows.
        field: request field that named the file, for the error.
        schema: what the rows must follow; that of the first row when None.
        folder: where the token ids are kept; they are not when None.
        check: called between rows; raises to give up.

    Raises:
        InvalidArgument: `invalid_dataset` as `DatasetReader.finish`, and `example_too_long`,
            `no_chat_template`, `no_supervised_tokens`, `template_not_prefix_preserving`.
    """
    reader = DatasetReader(path, field=field, schema=schema)
    counting = _Counting(reader, spec, RowEncoder(encoder, spec.loss_scope))
    if folder is None:
        return counting.run(encoder, None, check)
    with closing(TokenWriter(folder, path)) as writer:
        return counting.run(encoder, writer, check)


class _Counting:
    """The figures of a survey while it runs."""

    def __init__(self, reader: DatasetReader, spec: TrainingSpec, encoder: RowEncoder) -> None:
        self._reader = reader
        self._spec = spec
        self._encoder = encoder
        self._lengths = array("i")
        self._supervised = array("i")
        self._row_digests = array("Q")
        self._prompt_digests = array("Q")
        self._longest: tuple[int, int] = (0, 0)
        self._overlong: list[tuple[int, int]] = []
        self._overlong_rows = self._truncated_rows = 0
        self._without_stop = self._mismatches = self._last_only = 0

    def run(self, encoder: PromptEncoder, writer: TokenWriter | None, check: Callable[[], None]) -> Survey:
        faults = self._reader.faults
        for batch in _batches(self._reader.rows(), check):
            if faults.count >= REPORTED_FAULTS:
                continue
            if isinstance(batch[0][1], ConversationRow) and not encoder.has_chat_template:
                text = "the base has no chat template; use prompt and completion rows"
                faults.add(LineError("no_chat_template", text), batch[0][1].line)
                break
            for (offset, row), encoded in zip(
                batch, self._encoder.encode([row for _, row in batch]), strict=True
            ):
                if isinstance(encoded, LineError):
                    faults.add(encoded, row.line)
                    continue
                kept = self._within_limit(encoded, row.line)
                if kept is not None:
                    self._count(row, kept)
                    if writer is not None:
                        writer.append(kept, row.line, offset)
        self._reader.finish()
        self._refuse_overlong()
        return Survey(
            schema=self._reader.schema,
            digest=self._reader.digest,
            lengths=np.frombuffer(self._lengths, dtype=np.int32),
            supervised=np.frombuffer(self._supervised, dtype=np.int32),
            row_digests=np.frombuffer(self._row_digests, dtype=np.uint64),
            prompt_digests=np.frombuffer(self._prompt_digests, dtype=np.uint64),
            max_row_tokens=self._longest[0],
            overlong_rows=self._overlong_rows,
            truncated_rows=self._truncated_rows,
            rows_without_stop=self._without_stop,
            prefix_mismatch_rows=self._mismatches,
            last_turn_only_rows=self._last_only,
            rows=None if writer is None else writer.finish(self._reader.schema),
        )

    def _within_limit(self, row: EncodedRow, line: int) -> EncodedRow | None:
        """Return the row as the overlong policy leaves it; None where that is not at all."""
        size = len(row.ids)
        self._longest = max(self._longest, (size, -line))
        if size <= self._spec.max_seq_len:
            return row
        self._overlong_rows += 1
        if len(self._overlong) < REPORTED_FAULTS:
            self._overlong.append((size, -line))
        if self._spec.overlong_policy is not OverlongPolicy.TRUNCATE:
            return None
        cut = self._encoder.cut(row, self._spec.max_seq_len)
        self._truncated_rows += cut is not None
        return cut

    def _count(self, row: Row, encoded: EncodedRow) -> None:
        self._lengths.append(len(encoded.ids))
        self._supervised.append(encoded.num_supervised)
        self._row_digests.append(int.from_bytes(row.digest[:8], "little"))
        self._prompt_digests.append(int.from_bytes(row.prompt_digest[:8], "little"))
        self._without_stop += not encoded.stops
        self._mismatches += not encoded.is_prefix_kept
        self._last_only += encoded.is_last_turn_only

    def _refuse_overlong(self) -> None:
        faults, limit = self._reader.faults, self._spec.max_seq_len
        if self._overlong_rows and self._spec.overlong_policy is OverlongPolicy.REJECT:
            # The worst line first, whatever came before it.
            listed = [self._longest, *(each for each in self._overlong if each != self._longest)]
            for size, line in listed[:REPORTED_FAULTS]:
                text = f"{size} tokens, at most {limit}; shorten it or set overlong_policy"
                faults.add(LineError("example_too_long", text), -line)
            faults.add_unlisted(self._overlong_rows - min(len(listed), REPORTED_FAULTS))
        elif not self._lengths:
            faults.add(LineError("empty_dataset", f"no row fits in {limit} tokens; raise max_seq_len"))
        faults.raise_if_any()


def _batches(rows: Iterator[tuple[int, Row]], check: Callable[[], None]) -> Iterator[list[tuple[int, Row]]]:
    """Yield rows in lists that are worth encoding at once."""
    batch: list[tuple[int, Row]] = []
    size = 0
    for item in rows:
        check()
        batch.append(item)
        size += text_size(item[1])
        if len(batch) == BATCH_ROWS or size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
