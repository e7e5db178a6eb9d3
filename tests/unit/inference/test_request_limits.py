"""What can never be served is refused, with the field, the value and the limit."""

from __future__ import annotations

from typing import Any

import pytest

from services.common.errors import InvalidArgument
from services.inference.engine.request import Request, RequestLimits, SamplingParams

LIMITS = RequestLimits(max_model_len=32, vocab_size=100)


def make(prompt: tuple[int, ...] = (1, 2, 3), **sampling: Any) -> Request:
    return Request("r", prompt, SamplingParams(**{"max_tokens": 4, **sampling}))


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("prompt", make(())),
        ("prompt_token_ids", make((100,))),
        ("prompt_token_ids", make((-1,))),
        ("max_tokens", make(max_tokens=-1)),
        ("max_tokens", make(max_tokens=0)),
        ("max_tokens", make(max_tokens=0, prompt_logprobs=1, n=2)),
        ("min_tokens", make(min_tokens=5)),
        ("min_tokens", make(min_tokens=-1)),
        ("temperature", make(temperature=-0.1)),
        ("temperature", make(temperature=float("nan"))),
        ("temperature", make(temperature=float("inf"))),
        ("top_p", make(top_p=0.0)),
        ("top_p", make(top_p=1.1)),
        ("min_p", make(min_p=1.5)),
        ("top_k", make(top_k=-1)),
        ("repetition_penalty", make(repetition_penalty=0.0)),
        ("presence_penalty", make(presence_penalty=2.5)),
        ("frequency_penalty", make(frequency_penalty=-2.5)),
        ("logit_bias", make(logit_bias={100: 1.0})),
        ("logit_bias", make(logit_bias={1: float("nan")})),
        ("logit_bias", make(logit_bias={1: 101.0})),
        ("logprobs", make(logprobs=21)),
        ("prompt_logprobs", make(prompt_logprobs=-1)),
        ("stop_token_ids", make(stop_token_ids=frozenset({100}))),
        ("stop", make(stop=("",))),
        ("stop", make(stop=("x",) * 17)),
        ("stop", make(stop=("x" * 257,))),
        ("n", make(n=0)),
        ("n", make(n=17)),
        ("seed", make(seed=2**64)),
    ],
)
def test_refused_by_field(field: str, request_: Request) -> None:
    with pytest.raises(InvalidArgument) as caught:
        LIMITS.check(request_)
    assert caught.value.field == field


@pytest.mark.parametrize(("prompt", "max_tokens", "total"), [(20, 13, 33), (32, None, 33), (40, 1, 41)])
def test_the_context_length_is_refused_with_both_numbers(
    prompt: int, max_tokens: int | None, total: int
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        LIMITS.check(make((1,) * prompt, max_tokens=max_tokens))
    assert caught.value.reason == "context_length_exceeded"
    assert (caught.value.value, caught.value.limit) == (str(total), "32")


def test_what_just_fits_is_accepted() -> None:
    LIMITS.check(make((1,) * 20, max_tokens=12))
    LIMITS.check(make((1,) * 32, max_tokens=0, prompt_logprobs=0))
    open_ended = make((1,) * 20, max_tokens=None)
    LIMITS.check(open_ended)
    assert LIMITS.max_tokens(open_ended) == 12
