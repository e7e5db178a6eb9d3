"""From logits to tokens.

Each row is shaped (penalties, biases), scaled by its temperature, filtered (top-k, then top-p, then min-p),
and drawn from by the inverse of its cumulative distribution. The uniform number of a draw is a hash of the
sequence's seed, its index and the position, so neither the rest of the batch nor a preemption changes it.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from services.common.errors import Internal, LorafleetError
from services.inference.engine.events import TokenLogprob
from services.inference.engine.sequence import Sequence

logger = logging.getLogger(__name__)

_UNIFORM_BITS = 48


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was chosen for one sequence, or why nothing could be."""

    token_id: int = -1
    logprob: TokenLogprob | None = None
    error: LorafleetError | None = None


class Sampler:
    """Chooses the next token of each sequence. `eos_token_ids` are the base's end-of-sequence tokens."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Items[Sequence]) -> list[Sampled]:
        """Choose one token per row of logits [rows, vocabulary] (float32); row i belongs to `sequences[i]`.

        A row that cannot be sampled gets an error; the others are not affected.
        """
        errors: dict[int, LorafleetError] = {}
        finite = torch.isfinite(logits).all(dim=-1).tolist()
        shaped = logits.clone()
        for row, sequence in enumerate(sequences):
            if not finite[row]:
                errors[row] = Internal("logits_not_finite", "The model gave infinite or undefined logits.")
                shaped[row] = 0.0
                continue
            try:
                self._shape(shaped[row], sequence)
            except Exception as error:  # One request's parameters must not end the others' step.
                logger.exception("shaping the logits of request %s failed", sequence.request.id)
                errors[row] = Internal("sampling_failed", f"Sampling failed: {type(error).__name__}.")
                shaped[row] = 0.0
        tokens = _choose(shaped, sequences)
        logprobs = _logprobs_of_chosen(logits, sequences, tokens)
        return [
            Sampled(error=errors[row]) if row in errors else Sampled(token, logprobs[row])
            for row, token in enumerate(tokens)
        ]

    def _shape(self, logits: Tensor, sequence: Sequence) -> None:
        """Apply one sequence's penalties, biases and bans to its row, in place."""
        sampling = sequence.sampling
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(sequence.token_ids)), device=logits.device)
            values = logits[seen]
            penalty = sampling.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        counts = sequence.output_counts
        if counts and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
            logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
        if sequence.num_output < sampling.min_tokens:
            banned = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else self._eos_token_ids)
            logits[torch.tensor(sorted(banned), dtype=torch.long, device=logits.device)] = -torch.inf


def score(logits: Tensor, token_ids: Items[int], top: int) -> list[TokenLogprob]:
    """Return the log-probability of each of `token_ids` under its row of logits, with the `top` likeliest
    tokens.

    Args:
        logits: [rows, vocabulary] float32.
        token_ids: one per row.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    ids = torch.tensor(token_ids, dtype=torch.long, device=logits.device)
    chosen = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    if top == 0:
        return [TokenLogprob(token, value) for token, value in zip(token_ids, chosen, strict=True)]
    values, indices = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    rows = zip(token_ids, chosen, indices.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(others, tops, strict=True)))
        for token, value, others, tops in rows
    ]


def uniform(seed: int, index: int, position: int) -> float:
    """Return a number in [0, 1) that depends on nothing but its arguments."""
    message = struct.pack("<QIQ", seed % 2**64, index, position)
    digest = hashlib.blake2b(message, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> (64 - _UNIFORM_BITS)) / 2.0**_UNIFORM_BITS


def _choose(logits: Tensor, sequences: Items[Sequence]) -> list[int]:
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    plain: list[int] = []
    filtered: list[int] = []
    for row, sequence in enumerate(sequences):
        sampling = sequence.sampling
        if sampling.temperature > 0:
            (filtered if sampling.top_p < 1 or sampling.top_k > 0 else plain).append(row)
    for rows, draw in ((plain, _draw_plain), (filtered, _draw_filtered)):
        if rows:
            chosen = draw(logits[rows], [sequences[row] for row in rows])
            for row, token in zip(rows, chosen, strict=True):
                tokens[row] = token
    return tokens


def _draw_plain(logits: Tensor, sequences: Items[Sequence]) -> list[int]:
    probabilities = torch.softmax(logits / _column(sequences, "temperature", logits), dim=-1)
    probabilities = _at_least_min_p(probabilities, sequences)
    tokens: list[int] = _inverse(probabilities, sequences).tolist()
    return tokens


def _draw_filtered(logits: Tensor, sequences: Items[Sequence]) -> list[int]:
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered / _column(sequences, "temperature", logits)
    top_k = _column(sequences, "top_k", logits)
    ranks = torch.arange(ordered.shape[-1], device=logits.device)
    ordered = ordered.masked_fill((top_k > 0) & (ranks >= top_k), -torch.inf)
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = before >= _column(sequences, "top_p", logits)
    outside[:, 0] = False
    probabilities = _at_least_min_p(probabilities.masked_fill(outside, 0.0), sequences)
    tokens: list[int] = order.gather(1, _inverse(probabilities, sequences)[:, None])[:, 0].tolist()
    return tokens


def _at_least_min_p(probabilities: Tensor, sequences: Items[Sequence]) -> Tensor:
    floor = _column(sequences, "min_p", probabilities) * probabilities.amax(dim=-1, keepdim=True)
    return probabilities.masked_fill(probabilities < floor, 0.0)


def _inverse(probabilities: Tensor, sequences: Items[Sequence]) -> Tensor:
    """Return, per row, the first column where the cumulative sum exceeds the row's uniform share of the
    total.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    shares = [uniform(sequence.seed, sequence.index, sequence.num_output) for sequence in sequences]
    share = torch.tensor(shares, dtype=torch.float64, device=probabilities.device)[:, None]
    return torch.searchsorted(cumulative, share * cumulative[:, -1:], right=True)[:, 0]


def _column(sequences: Items[Sequence], name: str, like: Tensor) -> Tensor:
    values = [float(getattr(sequence.sampling, name)) for sequence in sequences]
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _logprobs_of_chosen(
    logits: Tensor, sequences: Items[Sequence], tokens: Items[int]
) -> list[TokenLogprob | None]:
    wanted = [sequence.sampling.logprobs for sequence in sequences]
    rows = [row for row, top in enumerate(wanted) if top is not None]
    result: list[TokenLogprob | None] = [None] * len(tokens)
    if rows:
        most = max(top for top in wanted if top is not None)
        for row, scored in zip(rows, score(logits[rows], [tokens[row] for row in rows], most), strict=True):
            result[row] = TokenLogprob(scored.token_id, scored.logprob, scored.top[: wanted[row]])
    return result
