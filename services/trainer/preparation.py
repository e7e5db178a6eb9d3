"""From files to the rows that are trained on and the rows that are held out, with a report on both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.common.errors import DataLoss
from services.common.prompts import PromptEncoder
from services.trainer.dataset import FaultList, LineError
from services.trainer.job import DatasetReport, HistogramBucket, JobRequest
from services.trainer.spec import TaskMetric, TrainingSpec
from services.trainer.survey import Survey, survey
from services.trainer.token_rows import TokenRows


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What a run reads.

    Attributes:
        training: rows to train on.
        validation: held-out rows; none of those taken from the training file is trained on.
    """

    training: TokenRows
    validation: TokenRows
    report: DatasetReport

    @property
    def for_probes(self) -> TokenRows:
        """Rows to compare two services by: held-out ones where there are any."""
        return self.validation if len(self.validation) else self.training


@dataclass(frozen=True, slots=True)
class _Division:
    """The files of a job, and which rows of them are trained on and which are held out."""

    surveys: list[Survey]
    training: NDArray[np.int64]
    validation: NDArray[np.int64]


def check_data(
    training_path: Path,
    validation_path: Path | None,
    encoder: PromptEncoder,
    spec: TrainingSpec,
    *,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> DatasetReport:
    """Return the report on a job's data and keep nothing else of it; arguments and errors as `prepare`."""
    return _report(_divide(training_path, validation_path, encoder, spec, seed, None, check))


def prepare(
    training_path: Path,
    validation_path: Path | None,
    encoder: PromptEncoder,
    spec: TrainingSpec,
    *,
    seed: int,
    folder: Path,
    check: Callable[[], None] = lambda: None,
) -> PreparedData:
    """Return the data of a job; the same files, specification and seed give the same rows.

    Args:
        training_path: the training file, which must stay where it is while the rows are used.
        validation_path: the validation file, as well; rows are held out of the training file when None.
        encoder: the base's tokenizer and chat template.
        spec: what is learned, and what happens to long rows.
        seed: decides which rows are held out.
        folder: where the token ids are kept; must not exist yet.
        check: called between rows; raises to give up.

    Raises:
        InvalidArgument: `invalid_dataset`, naming every bad line.
    """
    division = _divide(training_path, validation_path, encoder, spec, seed, folder, check)
    rows = [survey.rows for survey in division.surveys]
    assert all(each is not None for each in rows), "a survey with a folder keeps its rows"
    first, last = rows[0], rows[-1]
    assert first is not None
    assert last is not None
    return PreparedData(first.take(division.training), last.take(division.validation), _report(division))


def prepare_validated(
    request: JobRequest,
    validated: DatasetReport,
    files: Path,
    encoder: PromptEncoder,
    *,
    folder: Path,
    check: Callable[[], None] = lambda: None,
) -> PreparedData:
    """Return the data of a job whose files lie in the folder `files`, by their ids; the rest as `prepare`.

    Raises:
        DataLoss: `dataset_changed`, where it is not what was `validated`.
    """
    training_path, *validation_paths = (files / file_id for file_id in request.files)
    data = prepare(
        training_path,
        validation_paths[0] if validation_paths else None,
        encoder,
        request.spec,
        seed=request.seed,
        folder=folder,
        check=check,
    )
    if data.report != validated:
        raise DataLoss("dataset_changed", "the data is not what was validated", field="training_file")
    return data


def hold_out(
    prompt_digests: NDArray[np.uint64], fraction: float, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the rows to train on and of about `fraction` of all rows to hold out, ascending.

    Rows with the same prompt stay together, so no held-out prompt is trained on; at least one prompt is.

    Args:
        prompt_digests: uint64 [rows], equal where prompts are.
        fraction: 0 to below 1.
        seed: another one holds out other rows.
    """
    wanted = round(fraction * len(prompt_digests))
    prompts, group_of, sizes = np.unique(prompt_digests, return_inverse=True, return_counts=True)
    is_held_out = np.zeros(len(prompts), dtype=np.bool_)
    taken = 0
    for prompt in np.argsort(_mixed(prompts, seed), kind="stable")[:-1].tolist():
        if taken == wanted:
            break
        if taken + sizes[prompt] <= wanted:
            taken += sizes[prompt]
            is_held_out[prompt] = True
    held_out = is_held_out[group_of]
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _mixed(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return a number for each value that looks drawn at random, the same for the same seed everywhere.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014) over value plus seed.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/held out".encode("ascii")).digest()[:8], "big")
    mixed = values + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _divide(
    training_path: Path,
    validation_path: Path | None,
    encoder: PromptEncoder,
    spec: TrainingSpec,
    seed: int,
    folder: Path | None,
    check: Callable[[], None],
) -> _Division:
    first = survey(
        training_path,
        encoder,
        spec,
        field="training_file",
        folder=None if folder is None else folder / "training",
        check=check,
    )
    if validation_path is None:
        training, validation = hold_out(first.prompt_digests, spec.validation_fraction, seed=seed)
        return _checked(_Division([first], training, validation), spec)
    second = survey(
        validation_path,
        encoder,
        spec,
        field="validation_file",
        schema=first.schema,
        folder=None if folder is None else folder / "validation",
        check=check,
    )
    everything = (np.arange(len(each.lengths), dtype=np.int64) for each in (first, second))
    return _checked(_Division([first, second], *everything), spec)


def _checked(division: _Division, spec: TrainingSpec) -> _Division:
    """Return the division; refuse what only shows over whole files."""
    first = division.surveys[0]
    faults = FaultList("training_file")
    if spec.task_metric is not TaskMetric.NONE and not first.has_answers:
        text = f"text rows hold no answers to score by {spec.task_metric}; leave task_metric out"
        faults.add(LineError("no_answers", text))
    overlap = _overlap(division)
    if spec.strict and overlap:
        text = f"{overlap} rows of it are also in training_file; remove them, or do not ask for strict"
        faults = FaultList("validation_file")
        faults.add(LineError("train_validation_overlap", text))
    faults.raise_if_any()
    return division


def _overlap(division: _Division) -> int:
    """Return how many rows of the validation file are also trained on."""
    if len(division.surveys) == 1:
        return 0
    first, second = division.surveys
    return int(np.isin(second.row_digests, first.row_digests).sum())


def _report(division: _Division) -> DatasetReport:
    first = division.surveys[0]
    every = division.surveys
    supervised = first.supervised[division.training]
    return DatasetReport(
        rows=len(division.training),
        validation_rows=len(division.validation),
        schema=first.schema.value,
        tokens=int(first.lengths[division.training].sum(dtype=np.int64)),
        supervised_tokens=int(supervised.sum(dtype=np.int64)),
        max_row_tokens=max(each.max_row_tokens for each in every),
        overlong_rows=sum(each.overlong_rows for each in every),
        duplicate_rows=len(first.row_digests) - len(np.unique(first.row_digests)),
        overlap_rows=_overlap(division),
        digest=first.digest,
        truncated_rows=sum(each.truncated_rows for each in every),
        dropped_rows=sum(each.overlong_rows - each.truncated_rows for each in every),
        supervised_histogram=_histogram(supervised),
        rows_without_stop=sum(each.rows_without_stop for each in every),
        prefix_mismatch_rows=sum(each.prefix_mismatch_rows for each in every),
        last_turn_only_rows=sum(each.last_turn_only_rows for each in every),
        validation_digest=every[1].digest if len(every) > 1 else "",
    )


def _histogram(counts: NDArray[np.int32]) -> tuple[HistogramBucket, ...]:
    """Return how many rows have up to 1, 2, 4, 8 ... tokens, each row in the first bucket that holds it."""
    exponents = np.ceil(np.log2(np.maximum(counts, 1))).astype(np.int64)
    rows = np.bincount(exponents)
    return tuple(HistogramBucket(2**exponent, int(count)) for exponent, count in enumerate(rows) if count)
