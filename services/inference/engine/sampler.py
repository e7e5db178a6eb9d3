"""From logits to tokens.

Each row is shaped (penalties, biases, bans, the mask of a constraint), scaled by its temperature, filtered
(top-k, then top-p, then min-p), and drawn from by the inverse of its cumulative distribution. The uniform
number of a draw is a hash of the sequence's seed, its index and the position, so neither the rest of the
batch nor a preemption changes it. All rows are worked on at once; where all are greedy and want nothing more,
that is finding their maxima.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from services.common.errors import Internal, LorafleetError
from services.inference.engine.events import TokenLogprob
from services.inference.engine.sequence import Sequence
from services.inference.engine.shaping import shape

_UNIFORM_BITS = 48
# Rows that keep only likely tokens are sorted as far as this; those that need more are sorted whole.
_SHORT_LIST = 1024


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
        shaped, errors = shape(logits, sequences, self._eos_token_ids)
        highest, best = shaped.max(dim=-1)
        tokens: list[int] = best.tolist()
        # Whatever is undefined or infinite in a row is its maximum.
        broken = (~torch.isfinite(highest)).nonzero()[:, 0].tolist()
        for row in broken:
            errors.setdefault(
                row, Internal("logits_not_finite", "The model gave infinite or undefined logits.")
            )
        drawn = [
            row for row, item in enumerate(sequences) if item.sampling.temperature > 0 and row not in errors
        ]
        for row, token in zip(drawn, _draw(shaped, drawn, sequences), strict=True):
            tokens[row] = token
        logprobs = _logprobs_of_chosen(logits, sequences, tokens)
        return [
            Sampled(error=errors[row]) if row in errors else Sampled(token, logprobs[row])
            for row, token in enumerate(tokens)
        ]


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


def _draw(logits: Tensor, rows: Items[int], sequences: Items[Sequence]) -> list[int]:
    """Return a token for each of `rows` of logits [all rows, vocabulary], all of temperature above 0."""
    tokens: dict[int, int] = {}
    plain = [row for row in rows if not _is_filtered(sequences[row])]
    filtered = [row for row in rows if _is_filtered(sequences[row])]
    if plain:
        some = [sequences[row] for row in plain]
        tokens |= zip(plain, _draw_plain(_scaled(logits, plain, some), some), strict=True)
    if filtered:
        some = [sequences[row] for row in filtered]
        tokens |= zip(filtered, _draw_filtered(_scaled(logits, filtered, some), some), strict=True)
    return [tokens[row] for row in rows]


def _is_filtered(sequence: Sequence) -> bool:
    return sequence.sampling.top_p < 1 or sequence.sampling.top_k > 0


def _scaled(logits: Tensor, rows: Items[int], sequences: Items[Sequence]) -> Tensor:
    """Divide by the temperature what lies above the row's maximum, which no temperature makes infinite."""
    chosen = logits if len(rows) == len(logits) else logits[rows]
    chosen = chosen - chosen.amax(dim=-1, keepdim=True)
    return chosen / _column(sequences, "temperature", chosen).clamp_min(1e-6)


def _draw_plain(scaled: Tensor, sequences: Items[Sequence]) -> list[int]:
    probabilities = _at_least_min_p(torch.softmax(scaled, dim=-1), sequences)
    tokens: list[int] = _inverse(probabilities, sequences).tolist()
    return tokens


def _draw_filtered(scaled: Tensor, sequences: Items[Sequence]) -> list[int]:
    """Draw among the likeliest: from a short list where what is kept ends within it, else from the whole.

    Equal logits are in order of their ids, so which list is used changes nothing.
    """
    width = min(_SHORT_LIST, scaled.shape[-1])
    order = scaled.topk(width, dim=-1).indices.sort(dim=-1).values
    listed, places = scaled.gather(1, order).sort(dim=-1, descending=True, stable=True)
    order = order.gather(1, places)
    kept, is_settled = _kept(listed, scaled, sequences)
    tokens: list[int] = order.gather(1, _inverse(kept, sequences)[:, None])[:, 0].tolist()
    if width == scaled.shape[-1] or is_settled.all():
        return tokens
    rest = (~is_settled).nonzero()[:, 0].tolist()
    some = [sequences[row] for row in rest]
    whole = scaled[rest]
    listed, order = whole.sort(dim=-1, descending=True, stable=True)
    kept, _ = _kept(listed, whole, some)
    chosen = order.gather(1, _inverse(kept, some)[:, None])[:, 0].tolist()
    for row, token in zip(rest, chosen, strict=True):
        tokens[row] = token
    return tokens


def _kept(listed: Tensor, scaled: Tensor, sequences: Items[Sequence]) -> tuple[Tensor, Tensor]:
    """Return what is kept of the likeliest tokens, and whether that certainly ends before the list does.

    Args:
        listed: [rows, width] the highest of `scaled`, falling.
        scaled: [rows, vocabulary].

    Returns:
        Unnormalised probabilities [rows, width], 0 where not kept; and [rows] truth values.
    """
    top_k = _column(sequences, "top_k", listed)
    ranks = torch.arange(listed.shape[-1], device=listed.device)
    within_k = (top_k == 0) | (ranks < top_k)
    weights = listed.double().exp().masked_fill(~within_k, 0.0)
    # Without top-k the whole vocabulary shares the probability; with it, those that it keeps.
    every = scaled.double().exp().sum(dim=-1, keepdim=True)
    total = torch.where(top_k > 0, weights.sum(dim=-1, keepdim=True), every)
    before = weights.cumsum(dim=-1) - weights
    within_p = before < _column(sequences, "top_p", weights) * total
    within_p[:, 0] = True
    kept = _at_least_min_p(weights.masked_fill(~within_p, 0.0), sequences)
    last = kept.gt(0).sum(dim=-1, keepdim=True) - 1
    # A token that is as likely as the list's last may have others like it beyond the list.
    ends_within = listed.gather(1, last) > listed[:, -1:]
    k_within = (top_k == 0) | (top_k < listed.shape[-1])
    return kept, (ends_within & k_within)[:, 0]


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
