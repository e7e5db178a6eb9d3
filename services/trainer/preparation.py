"""From files to the rows that are trained on and the rows that are held out, with a report on both."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.common.prompts import PromptEncoder
from services.trainer.dataset import Dataset, Row, read_dataset
from services.trainer.dataset.reader import overlap_rows
from services.trainer.job import DatasetReport
from services.trainer.spec import TrainingSpec
from services.trainer.tokens import TokenRow, TokenSet, tokenize


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What a run reads.

    Attributes:
        training: rows to train on.
        validation: held-out rows; none of those taken from the training file is trained on.
        truncated_rows: rows that were cut on the left.
        dropped_rows: rows that were left out for their length.
    """

    training: tuple[TokenRow, ...]
    validation: tuple[TokenRow, ...]
    report: DatasetReport
    truncated_rows: int
    dropped_rows: int


def prepare(
    training_path: Path,
    validation_path: Path | None,
    encoder: PromptEncoder,
    spec: TrainingSpec,
    *,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> PreparedData:
    """Return the data of a job; the same files, specification and seed give the same rows.

    Args:
        check: called between rows; raises to give up.

    Raises:
        InvalidArgument: `invalid_dataset`, naming every bad line.
    """
    dataset = read_dataset(training_path)
    tokens = _tokenize(dataset, encoder, spec, "training_file", check)
    sets = [tokens]
    overlap = 0
    if validation_path is None:
        training, validation = hold_out(tokens.rows, spec.validation_fraction, seed=seed)
    else:
        held_out = read_dataset(validation_path, field="validation_file", schema=dataset.schema)
        sets.append(_tokenize(held_out, encoder, spec, "validation_file", check))
        training, validation = tokens.rows, sets[-1].rows
        overlap = overlap_rows(sources(training), sources(validation))
    overlong = sum(each.overlong_rows for each in sets)
    truncated = sum(each.truncated_rows for each in sets)
    report = DatasetReport(
        rows=len(training),
        validation_rows=len(validation),
        schema=dataset.schema.value,
        tokens=sum(len(row.ids) for row in training),
        supervised_tokens=sum(row.num_supervised for row in training),
        max_row_tokens=max(each.max_row_tokens for each in sets),
        overlong_rows=overlong,
        duplicate_rows=dataset.duplicate_rows,
        overlap_rows=overlap,
        digest=dataset.digest,
    )
    return PreparedData(training, validation, report, truncated, overlong - truncated)


def hold_out(
    rows: tuple[TokenRow, ...], fraction: float, *, seed: int
) -> tuple[tuple[TokenRow, ...], tuple[TokenRow, ...]]:
    """Return `rows` in two parts, the second of about `fraction` of them.

    Rows with the same prompt stay together, so no held-out prompt is trained on; at least one prompt is.
    """
    wanted = round(fraction * len(rows))
    by_prompt: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        by_prompt.setdefault(row.source.prompt_digest, []).append(index)
    prompts = list(by_prompt)
    # Not for secrets: the same seed must hold out the same rows.
    random.Random(f"{seed}/held out").shuffle(prompts)  # noqa: S311
    held_out: set[int] = set()
    for prompt in prompts[:-1]:
        group = by_prompt[prompt]
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    training = tuple(row for index, row in enumerate(rows) if index not in held_out)
    return training, tuple(rows[index] for index in sorted(held_out))


def sources(rows: tuple[TokenRow, ...]) -> list[Row]:
    """Return the rows of the file that `rows` were made of."""
    return [row.source for row in rows]


def _tokenize(
    dataset: Dataset, encoder: PromptEncoder, spec: TrainingSpec, field: str, check: Callable[[], None]
) -> TokenSet:
    return tokenize(
        dataset.rows,
        encoder,
        max_seq_len=spec.max_seq_len,
        overlong_policy=spec.overlong_policy,
        loss_scope=spec.loss_scope,
        field=field,
        check=check,
    )
