"""The sampler against its plain twin: one row at a time, in float64, by the definitions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from services.common.token_bytes import TokenBytes
from services.inference.engine import sampler
from services.inference.engine.request import Request, SamplingParams
from services.inference.engine.sampler import Sampler, uniform
from services.inference.engine.sequence import Sequence
from services.inference.engine.text import TextStream
from tests.support.models import byte_tokenizer

VOCAB = 40
EOS = frozenset({0, 1})
TOKENIZER = TokenBytes(byte_tokenizer().backend_tokenizer)


def sequence(prompt: list[int], output: list[int], index: int, sampling: dict[str, Any]) -> Sequence:
    params = SamplingParams(max_tokens=100, **sampling)
    request = Request("r", tuple(prompt), params)
    text = TextStream(TOKENIZER, prompt, ())
    result = Sequence(request, index, params.seed or 0, 100, text, list(prompt))
    for token in output:
        result.append(token)
    return result


def plain_weights(logits: NDArray[np.float64], row: Sequence) -> NDArray[np.float64]:
    """Return each token's unnormalised probability to be drawn; for a greedy row, 1 for the best."""
    sampling, shaped = row.sampling, logits.copy()
    for token in set(row.token_ids):
        penalty = sampling.repetition_penalty
        shaped[token] = shaped[token] / penalty if shaped[token] > 0 else shaped[token] * penalty
    for token, count in Counter(row.token_ids[row.num_prompt :]).items():
        shaped[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    for token, bias in sampling.logit_bias.items():
        shaped[token] += bias
    if row.num_output < sampling.min_tokens:
        for token in sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else EOS):
            shaped[token] = -np.inf
    if sampling.temperature == 0:
        return np.asarray(np.arange(VOCAB) == shaped.argmax(), dtype=np.float64)
    shaped = (shaped - shaped.max()) / sampling.temperature
    order = sorted(range(VOCAB), key=lambda token: (-shaped[token], token))
    kept = order[: sampling.top_k] if sampling.top_k else order
    weights = {token: np.exp(shaped[token]) for token in kept}
    total, before = sum(weights.values()), 0.0
    inside: list[int] = []
    for token in kept:
        if not inside or before < sampling.top_p * total:
            inside.append(token)
        before += weights[token]
    result = np.zeros(VOCAB)
    for token in inside:
        if weights[token] >= sampling.min_p * weights[kept[0]]:
            result[token] = weights[token]
    return result


def acceptable(logits: NDArray[np.float64], row: Sequence) -> set[int]:
    """Return the tokens that the row's uniform number picks, with room for rounding at each border."""
    weights = plain_weights(logits, row)
    sampling = row.sampling
    is_sorted = sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1)
    order = sorted(range(VOCAB), key=lambda token: (-weights[token], token)) if is_sorted else range(VOCAB)
    share = uniform(row.seed, row.index, row.num_output) * weights.sum()
    slack, low, found = 1e-4 * weights.sum(), 0.0, set()
    for token in order:
        high = low + weights[token]
        if weights[token] > 0 and low - slack <= share < high + slack:
            found.add(token)
        low = high
    return found


sampling_params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 1.0]),
        "top_k": st.integers(0, VOCAB),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.7]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 1.5]),
        "frequency_penalty": st.sampled_from([-1.0, 0.0, 0.7]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=16), max_size=4),
        "min_tokens": st.integers(0, 4),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
        "seed": st.integers(-(2**63), 2**63 - 1),
    },
)
rows = st.tuples(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
    st.lists(st.integers(0, VOCAB - 1), max_size=6),
    st.integers(0, 3),
    sampling_params,
)


@settings(max_examples=300, deadline=None)
@given(
    items=st.lists(rows, min_size=1, max_size=6), seed=st.integers(0, 1000), short=st.sampled_from([3, 40])
)
def test_every_row_is_chosen_as_by_the_definitions(items: list[Any], seed: int, short: int) -> None:
    sequences = [sequence(*item) for item in items]
    logits = torch.randn(len(items), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_SHORT_LIST", short)
        sampled = Sampler(EOS).sample(logits, sequences)
        alone = [Sampler(EOS).sample(logits[row : row + 1], [one])[0] for row, one in enumerate(sequences)]
    assert torch.equal(logits, before)
    assert [item.token_id for item in sampled] == [item.token_id for item in alone]
    for row, item in enumerate(sampled):
        assert item.error is None
        assert item.token_id in acceptable(logits[row].double().numpy(), sequences[row])


def test_the_short_list_and_the_whole_agree_where_logits_are_equal() -> None:
    logits = torch.zeros(64, VOCAB)
    logits[:, ::3] = 1.0
    choices: list[dict[str, Any]] = [
        {"top_p": 0.3},
        {"top_k": 5},
        {"top_k": 20, "top_p": 0.9},
        {"top_p": 0.99, "min_p": 0.5},
    ]
    rows = [sequence([2], [], 0, {"seed": number, **choices[number % 4]}) for number in range(64)]
    found = []
    for width in (2, 7, VOCAB):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler, "_SHORT_LIST", width)
            found.append([item.token_id for item in Sampler(EOS).sample(logits, rows)])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 5


def test_greedy_rows_cost_one_pass_over_the_logits() -> None:
    calls: list[str] = []

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(isinstance(item, torch.Tensor) and item.numel() >= 16 * VOCAB for item in args):
                calls.append(str(func))
            return func(*args, **(kwargs or {}))

    logits = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(1))
    greedy = [sequence([2], [3], 0, {"temperature": 0.0}) for _ in range(16)]
    with Counting():  # type: ignore[no-untyped-call]
        sampled = Sampler(EOS).sample(logits, greedy)
    assert [item.token_id for item in sampled] == logits.argmax(-1).tolist()
    assert calls == ["aten.max.dim"]
