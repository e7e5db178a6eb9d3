"""Base against adapter on held-out rows, through the one model that was trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from services.common.prompts import PromptEncoder
from services.common.scoring import METRICS, Rows, Target, evidence_of, with_interval
from services.trainer.dataset import Row
from services.trainer.job import EvaluationMetric
from services.trainer.spec import TaskMetric, TrainingSpec
from services.trainer.tokens import TokenRow
from services.trainer.training.collapse import is_collapsed
from services.trainer.training.model import AdapterModel
from services.trainer.training.validation import RowScores, measure

# An answer may run this far past the longest reference before it is cut.
EXTRA_ANSWER_TOKENS = 16
GENERATION_ROWS = 16
# Without a task metric, so many answers are begun, to see whether they are all the same.
COLLAPSE_ROWS = 16
COLLAPSE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured on held-out rows; see `collapse` for the second."""

    figures: tuple[EvaluationMetric, ...] = ()
    collapsed: bool | None = None


def evaluate(
    model: AdapterModel,
    rows: Sequence[TokenRow],
    encoder: PromptEncoder,
    spec: TrainingSpec,
    *,
    seed: int,
    check: Callable[[], None],
) -> Evaluation:
    """Return loss, token accuracy and the task metric of base and adapter, over `spec.evaluation_rows` rows.

    Args:
        rows: held-out rows; none gives no figures.
        seed: for the bootstrap intervals.
        check: called between forward passes; raises to give up.
    """
    rows = rows[: spec.evaluation_rows]
    if not rows:
        return Evaluation()
    adapter = measure(model, rows, spec.batch_size, check=check)
    with model.base_only():
        base = measure(model, rows, spec.batch_size, check=check)
    figures = [
        _figure("loss", len(rows), seed, functools.partial(_loss, base), functools.partial(_loss, adapter)),
        _figure(
            "token_accuracy",
            len(rows),
            seed,
            functools.partial(_accuracy, base),
            functools.partial(_accuracy, adapter),
        ),
    ]
    different = _with_different_prompts(rows)
    if spec.task_metric is TaskMetric.NONE:
        begun = [rows[index] for index in different[:COLLAPSE_ROWS]]
        answers = generate(model, begun, encoder, check=check, max_answer_tokens=COLLAPSE_TOKENS)
        references = [
            _decode(encoder, row.ids[row.prompt_length : row.prompt_length + COLLAPSE_TOKENS])
            for row in begun
        ]
        return Evaluation(tuple(figures), is_collapsed(answers, references))
    metric = METRICS[spec.task_metric.value]
    targets = [target_of(row.source) for row in rows]
    answers = generate(model, rows, encoder, check=check)
    answered = evidence_of(metric, answers, targets)
    with model.base_only():
        before = evidence_of(metric, generate(model, rows, encoder, check=check), targets)
    figures.append(
        _figure(
            spec.task_metric.value,
            len(rows),
            seed,
            lambda drawn: metric.value(before[drawn]),
            lambda drawn: metric.value(answered[drawn]),
        )
    )
    collapsed = is_collapsed(
        [answers[index] for index in different], [rows[index].source.answer for index in different]
    )
    return Evaluation(tuple(figures), collapsed)


def _with_different_prompts(rows: Sequence[TokenRow]) -> list[int]:
    """Return the first row of each prompt, by index; none for rows that are all answer."""
    first: dict[tuple[int, ...], int] = {}
    for index, row in enumerate(rows):
        first.setdefault(row.ids[: row.prompt_length], index)
    first.pop((), None)
    return list(first.values())


def target_of(row: Row) -> Target:
    """Return what the model should have answered."""
    return Target(row.answer)


def generate(
    model: AdapterModel,
    rows: Sequence[TokenRow],
    encoder: PromptEncoder,
    *,
    check: Callable[[], None],
    max_answer_tokens: int | None = None,
) -> list[str]:
    """Return the greedy answer to the prompt of each row, in order."""
    longest_answer = max((len(row.ids) - row.prompt_length for row in rows), default=0) + EXTRA_ANSWER_TOKENS
    if max_answer_tokens is not None:
        longest_answer = min(longest_answer, max_answer_tokens)
    answers = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: rows[index].prompt_length)
    for start in range(0, len(order), GENERATION_ROWS):
        chosen = order[start : start + GENERATION_ROWS]
        prompts = [rows[i].ids[: rows[i].prompt_length] for i in chosen]
        for index, ids in zip(
            chosen, _generate_ids(model, prompts, encoder, longest_answer, check), strict=True
        ):
            answers[index] = _decode(encoder, ids)
    return answers


def _decode(encoder: PromptEncoder, ids: Sequence[int]) -> str:
    # A base may have more rows in its output head than its tokenizer has tokens.
    known = [token_id for token_id in ids if token_id < encoder.vocab_size]
    return encoder.decode(known, skip_special_tokens=True)


def _generate_ids(
    model: AdapterModel,
    prompts: Sequence[tuple[int, ...]],
    encoder: PromptEncoder,
    max_new_tokens: int,
    check: Callable[[], None],
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    # Padded on the left: every prompt must end where generation begins.
    input_ids = torch.tensor([[model.pad_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    room = model.model.config.max_position_embeddings - width
    stops = sorted(encoder.eos_token_ids)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(1, min(max_new_tokens, room)),
        eos_token_id=stops,
        pad_token_id=model.pad_id,
    )
    with torch.no_grad(), model.padded() as padded:
        output = padded.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Interruption(check)]),
        )
    answers = output[:, width:].tolist()
    return [_until_stop(ids, frozenset(stops)) for ids in answers]


def _until_stop(ids: list[int], stops: frozenset[int]) -> list[int]:
    for position, token_id in enumerate(ids):
        if token_id in stops:
            return ids[:position]
    return ids


class _Interruption(StoppingCriteria):  # type: ignore[misc]
    """Never stops by itself, but lets a cancel through at every token."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self._check()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _loss(scores: RowScores, rows: Rows) -> float:
    return float(scores.loss_sums[rows].sum() / scores.counts[rows].sum())


def _accuracy(scores: RowScores, rows: Rows) -> float:
    return float(scores.correct[rows].sum() / scores.counts[rows].sum())


def _figure(
    name: str, num_rows: int, seed: int, base: Callable[[Rows], float], adapter: Callable[[Rows], float]
) -> EvaluationMetric:
    after = with_interval(adapter, num_rows, seed=seed)
    lift = with_interval(lambda drawn: adapter(drawn) - base(drawn), num_rows, seed=seed)
    return EvaluationMetric(
        name, base(np.arange(num_rows)), after.value, num_rows, after.low, after.high, lift.low, lift.high
    )
