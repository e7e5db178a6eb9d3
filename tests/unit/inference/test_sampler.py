"""The sampler against its definition, transformers' own filters, and itself in other company."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from services.common.token_bytes import TokenBytes
from services.inference.engine.request import Request, SamplingParams
from services.inference.engine.sampler import Sampler, score, uniform
from services.inference.engine.sequence import Sequence
from services.inference.engine.text import TextStream
from tests.support.models import byte_tokenizer

VOCAB = 50
EOS = 0
TOKENIZER = TokenBytes(byte_tokenizer().backend_tokenizer)
SAMPLER = Sampler(frozenset({EOS}))


def sequence(
    output: tuple[int, ...] = (), *, prompt: tuple[int, ...] = (7,), index: int = 0, **sampling: Any
) -> Sequence:
    params = SamplingParams(**{"max_tokens": 100, "seed": 5, **sampling})
    request = Request("r", prompt, params)
    result = Sequence(request, index, params.seed or 0, 100, TextStream(TOKENIZER, prompt, ()), list(prompt))
    for token in output:
        result.append(token)
    return result


def some_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def choose(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    sampled = SAMPLER.sample(logits, sequences)
    assert all(item.error is None for item in sampled)
    return [item.token_id for item in sampled]


def draws(logits: Tensor, count: int, **sampling: Any) -> Counter[int]:
    """Draw `count` times from one row, with different seeds."""
    rows = [sequence(seed=seed, **sampling) for seed in range(count)]
    return Counter(choose(logits.expand(count, -1), rows))


def test_temperature_zero_is_greedy() -> None:
    logits = some_logits(8)
    assert choose(logits, [sequence(temperature=0.0) for _ in range(8)]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("sampling", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"min_p": 0.2}, MinPLogitsWarper(0.2)),
    ],
)
def test_frequencies_follow_the_filtered_distribution(sampling: dict[str, Any], warper: Any) -> None:
    logits = some_logits(1)
    expected = torch.softmax(warper(None, logits.clone()), dim=-1)[0]
    count = 4000
    seen = draws(logits, count, **sampling)
    assert all(expected[token] > 0 for token in seen)
    for token in range(VOCAB):
        probability = expected[token].item()
        spread = 4 * (probability * (1 - probability) / count) ** 0.5 + 1e-3
        assert seen[token] / count == pytest.approx(probability, abs=spread)


def test_temperature_flattens() -> None:
    logits = some_logits(1)
    best = int(logits.argmax())
    cold, warm = draws(logits, 500, temperature=0.3), draws(logits, 500, temperature=3.0)
    assert cold[best] > warm[best]
    assert len(warm) > len(cold)


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}, {"top_k": 9, "min_p": 0.01}])
def test_a_seed_gives_the_same_draws_whatever_else_is_in_the_batch(sampling: dict[str, Any]) -> None:
    logits = some_logits(9)
    alone = [choose(logits[row : row + 1], [sequence(seed=row, **sampling)])[0] for row in range(9)]
    mixed = [sequence(seed=row, **sampling) for row in range(9)]
    others = [sequence(temperature=0.0), sequence(seed=99, top_p=0.5), sequence(seed=98)]
    assert choose(torch.cat([some_logits(3, seed=1), logits]), [*others, *mixed])[3:] == alone


def test_draws_differ_by_seed_by_index_and_by_position() -> None:
    numbers = {
        uniform(seed, index, position) for seed in (1, -1, 2**63) for index in (0, 1) for position in (0, 1)
    }
    assert len(numbers) == 12
    assert all(0 <= number < 1 for number in numbers)


def test_uniform_numbers_are_uniform() -> None:
    numbers = torch.tensor([uniform(3, 0, position) for position in range(4000)])
    histogram = torch.histc(numbers, bins=10, min=0, max=1)
    assert histogram.min() > 320
    assert histogram.max() < 480


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 8, 9]] = torch.tensor([3.0, 2.5, 2.0])
    plain = sequence((8,), temperature=0.0)
    punished = sequence((8,), temperature=0.0, repetition_penalty=2.0)
    assert choose(logits.repeat(2, 1), [plain, punished]) == [7, 9]


def test_repetition_penalty_lowers_negative_logits_too() -> None:
    logits = torch.full((1, VOCAB), -2.0)
    logits[0, 7] = -1.5
    assert choose(logits, [sequence(temperature=0.0, repetition_penalty=2.0)]) != [7]


def test_presence_and_frequency_penalties_count_output_only() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 8, 9]] = torch.tensor([1.0, 3.0, 2.0])
    once = sequence((8,), temperature=0.0, presence_penalty=1.5)
    thrice = sequence((8, 8, 8), temperature=0.0, frequency_penalty=0.5)
    prompt_only = sequence((), prompt=(8,), temperature=0.0, presence_penalty=1.5, frequency_penalty=1.0)
    twice_is_too_little = sequence((8, 8), temperature=0.0, frequency_penalty=0.4)
    rows = [once, thrice, prompt_only, twice_is_too_little]
    assert choose(logits.repeat(4, 1), rows) == [9, 9, 8, 8]


def test_logit_bias_forces_and_forbids() -> None:
    logits = some_logits(1)
    best = int(logits.argmax())
    assert choose(logits, [sequence(temperature=0.0, logit_bias={3: 100.0})]) == [3]
    assert choose(logits, [sequence(temperature=0.0, logit_bias={best: -100.0})]) != [best]


def test_ends_are_impossible_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [EOS, 4, 5]] = torch.tensor([9.0, 8.0, 7.0])
    early = sequence((1,), temperature=0.0, min_tokens=2, stop_token_ids=frozenset({4}))
    late = sequence((1, 1), temperature=0.0, min_tokens=2, stop_token_ids=frozenset({4}))
    eos_is_ordinary = sequence((1,), temperature=0.0, min_tokens=2, ignore_eos=True)
    assert choose(logits.repeat(3, 1), [early, late, eos_is_ordinary]) == [5, EOS, EOS]


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    logits = some_logits(2)
    rows = [sequence(temperature=0.5, logprobs=4, logit_bias={3: 50.0}), sequence(logprobs=0)]
    sampled = SAMPLER.sample(logits, rows)
    expected = torch.log_softmax(logits, dim=-1)
    assert sampled[0].logprob is not None
    assert sampled[0].token_id == 3
    assert sampled[0].logprob.logprob == pytest.approx(expected[0, 3].item(), abs=1e-5)
    values, tokens = expected[0].topk(4)
    assert [token for token, _ in sampled[0].logprob.top] == tokens.tolist()
    assert [value for _, value in sampled[0].logprob.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert sampled[1].logprob is not None
    assert sampled[1].logprob.top == ()


def test_score_reads_the_given_tokens() -> None:
    logits = some_logits(3)
    expected = torch.log_softmax(logits, dim=-1)
    scored = score(logits, [4, 5, 6], 0)
    assert [item.logprob for item in scored] == pytest.approx([expected[i, 4 + i].item() for i in range(3)])


def test_a_row_of_nan_fails_alone() -> None:
    logits = some_logits(3)
    expected = logits.argmax(-1).tolist()
    logits[1, 4] = torch.nan
    sampled = SAMPLER.sample(logits, [sequence(temperature=0.0) for _ in range(3)])
    assert sampled[1].error is not None
    assert sampled[1].error.reason == "logits_not_finite"
    assert [sampled[0].token_id, sampled[2].token_id] == [expected[0], expected[2]]
