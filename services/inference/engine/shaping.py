"""What is done to logits before a token is chosen: penalties, biases, bans, and the masks of constraints."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from itertools import chain

import torch
from torch import Tensor

from services.common.errors import LorafleetError
from services.inference.engine.sequence import Sequence


def shape(
    logits: Tensor, sequences: Items[Sequence], eos_token_ids: frozenset[int]
) -> tuple[Tensor, dict[int, LorafleetError]]:
    """Return logits [rows, vocabulary] as the sequences' parameters shape them, and errors by row.

    The input is left as it is; without anything to do it is what is returned. Repetition divides positive and
    multiplies negative logits (Keskar et al. 2019, arXiv 1909.05858, section 4.1); presence and frequency are
    subtracted; biases are added; bans and constraints, which come last, cannot be outweighed.
    """
    errors: dict[int, LorafleetError] = {}
    if not any(map(_is_shaped, sequences)):
        return logits, errors
    shaped = logits.clone()
    _penalise_repetition(shaped, sequences)
    _add(shaped, ((row, _changes(sequence)) for row, sequence in enumerate(sequences)))
    _ban(shaped, sequences, eos_token_ids)
    for row, sequence in enumerate(sequences):
        if sequence.constraint is not None:
            try:
                sequence.constraint.mask(shaped[row])
            except LorafleetError as error:
                errors[row] = error
    return shaped, errors


def _is_shaped(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return bool(
        sequence.constraint is not None
        or sampling.logit_bias
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sequence.num_output < sampling.min_tokens
    )


def _penalise_repetition(logits: Tensor, sequences: Items[Sequence]) -> None:
    rows: list[int] = []
    tokens: list[int] = []
    factors: list[float] = []
    for row, sequence in enumerate(sequences):
        penalty = sequence.sampling.repetition_penalty
        if penalty != 1.0:
            seen = set(sequence.token_ids)
            rows += [row] * len(seen)
            tokens += seen
            factors += [penalty] * len(seen)
    if rows:
        at = torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)
        penalties = torch.tensor(factors, dtype=logits.dtype, device=logits.device)
        values = logits[at]
        logits[at] = torch.where(values > 0, values / penalties, values * penalties)


def _changes(sequence: Sequence) -> Iterable[tuple[int, float]]:
    """Yield what is added to which token's logit."""
    sampling = sequence.sampling
    yield from sampling.logit_bias.items()
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token_id, count in sequence.output_counts.items():
            yield token_id, -(sampling.presence_penalty + sampling.frequency_penalty * count)


def _add(logits: Tensor, changes: Iterable[tuple[int, Iterable[tuple[int, float]]]]) -> None:
    flat = [(row, token_id, value) for row, items in changes for token_id, value in items]
    if flat:
        rows, tokens, values = zip(*flat, strict=True)
        logits.index_put_(
            (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)),
            torch.tensor(values, dtype=logits.dtype, device=logits.device),
            accumulate=True,
        )


def _ban(logits: Tensor, sequences: Items[Sequence], eos_token_ids: frozenset[int]) -> None:
    """Make ends impossible before `min_tokens`."""
    early = [
        [
            (row, token_id)
            for token_id in sequence.sampling.stop_token_ids
            | (frozenset() if sequence.sampling.ignore_eos else eos_token_ids)
        ]
        for row, sequence in enumerate(sequences)
        if sequence.num_output < sequence.sampling.min_tokens
    ]
    flat = list(chain.from_iterable(early))
    if flat:
        rows, tokens = zip(*flat, strict=True)
        at = torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)
        logits[at] = -torch.inf
