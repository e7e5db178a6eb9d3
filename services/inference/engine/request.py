"""A request as the engine sees it, and the limits it must keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from services.common.errors import InvalidArgument
from services.inference.engine.constraint import Constraint

MAX_SEQUENCES = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
MAX_TEMPERATURE = 100.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Attributes:
        max_tokens: most tokens per sequence; None means up to the context length; 0 only scores the prompt.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this.
        top_k: keep the k likeliest tokens; 0 keeps all.
        min_p: keep tokens at least this times as likely as the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the
            output.
        presence_penalty: subtracted once for every token already in the output.
        frequency_penalty: subtracted per occurrence in the output.
        logit_bias: token id to a number added to its logit.
        seed: fixes the draws, whatever else is in the batch; None draws anew.
        logprobs: None, or how many alternatives to report beside each chosen token's log-probability.
        prompt_logprobs: as `logprobs`, for every prompt token but the first.
        stop: texts that end a sequence; they are not part of its text.
        stop_token_ids: tokens that end a sequence, besides the base's end-of-sequence tokens.
        min_tokens: end-of-sequence and stop tokens are impossible, and stop strings are not looked for,
            before this many tokens.
        ignore_eos: the base's end-of-sequence tokens are ordinary tokens.
        n: number of sequences.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1


@dataclass(frozen=True, slots=True)
class Request:
    """One admitted call, with its adapter version pinned.

    Attributes:
        id: unique among the engine's live requests.
        prompt_token_ids: at least one token.
        adapter_digest: the version's digest, or None for the base itself.
        deadline_seconds: when to give up, on the engine's clock (`time.monotonic` unless told otherwise).
        tenant: who asks; nothing that is computed for one tenant is used for another.
        priority: among the tenant's own requests, higher runs first.
        constraint: what every output must fit; it alone decides where an output may end.
        embeds: only the mean of the prompt's last hidden states is wanted; goes with `max_tokens` = 0.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter_digest: str | None = None
    deadline_seconds: float | None = None
    tenant: str = ""
    priority: int = 0
    constraint: Constraint | None = None
    embeds: bool = False


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the engine can serve at all."""

    max_model_len: int
    vocab_size: int

    def max_tokens(self, request: Request) -> int:
        """Return how many tokens each sequence of `request` may have."""
        room = self.max_model_len - len(request.prompt_token_ids)
        wanted = request.sampling.max_tokens
        return room if wanted is None else wanted

    def check(self, request: Request) -> None:
        """Refuse what can never be served.

        Raises:
            InvalidArgument: `context_length_exceeded`, `empty_prompt`, `bad_token_id` or `out_of_range`.
        """
        self._check_lengths(request)
        self._check_tokens("prompt_token_ids", request.prompt_token_ids)
        self._check_tokens("stop_token_ids", request.sampling.stop_token_ids)
        self._check_tokens("logit_bias", request.sampling.logit_bias)
        _check_sampling(request.sampling)

    def _check_lengths(self, request: Request) -> None:
        prompt = len(request.prompt_token_ids)
        if prompt == 0:
            raise InvalidArgument("empty_prompt", "The prompt has no tokens.", field="prompt")
        sampling = request.sampling
        if sampling.max_tokens is not None and sampling.max_tokens < 0:
            raise _out_of_range("max_tokens", sampling.max_tokens, "at least 0")
        scores_only = sampling.max_tokens == 0
        is_wanted = request.embeds or sampling.prompt_logprobs is not None
        if scores_only and not (is_wanted and sampling.n == 1):
            raise _out_of_range("max_tokens", 0, "at least 1, or 0 with prompt_logprobs or embeds, and n = 1")
        wanted = self.max_tokens(request)
        if prompt + wanted > self.max_model_len or (wanted < 1 and not scores_only):
            raise InvalidArgument(
                "context_length_exceeded",
                f"The prompt has {prompt} tokens and {max(wanted, 1)} more are asked for; "
                f"the model takes {self.max_model_len} in all.",
                field="max_tokens",
                value=prompt + max(wanted, 1),
                limit=self.max_model_len,
            )
        if not 0 <= sampling.min_tokens <= wanted:
            raise _out_of_range("min_tokens", sampling.min_tokens, f"0 to max_tokens ({wanted})")

    def _check_tokens(self, name: str, tokens: object) -> None:
        assert isinstance(tokens, tuple | frozenset | Mapping)
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise InvalidArgument(
                    "bad_token_id",
                    f"{name} has the token id {token}; the model has ids 0 to {self.vocab_size - 1}.",
                    field=name,
                    value=token,
                    limit=self.vocab_size - 1,
                )


def _check_sampling(sampling: SamplingParams) -> None:
    _check_range("temperature", sampling.temperature, 0.0, MAX_TEMPERATURE)
    _check_range("top_p", sampling.top_p, 0.0, 1.0, above=True)
    _check_range("min_p", sampling.min_p, 0.0, 1.0)
    _check_range("top_k", sampling.top_k, 0, 2**31 - 1)
    _check_range("repetition_penalty", sampling.repetition_penalty, 0.0, 100.0, above=True)
    _check_range("presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("n", sampling.n, 1, MAX_SEQUENCES)
    _check_range("logit_bias", len(sampling.logit_bias), 0, MAX_LOGIT_BIASES)
    for bias in sampling.logit_bias.values():
        _check_range("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    for name, wanted in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if wanted is not None:
            _check_range(name, wanted, 0, MAX_LOGPROBS)
    if sampling.seed is not None:
        _check_range("seed", sampling.seed, -(2**63), 2**64 - 1)
    _check_range("stop", len(sampling.stop), 0, MAX_STOP_STRINGS)
    for text in sampling.stop:
        _check_range("stop", len(text), 1, MAX_STOP_CHARS)


def _check_range(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    inside = low < value <= high if above else low <= value <= high
    if not inside or not math.isfinite(value):
        raise _out_of_range(name, value, f"{'above ' if above else ''}{low} to {high}")


def _out_of_range(name: str, value: float, limit: str) -> InvalidArgument:
    return InvalidArgument(
        "out_of_range", f"{name} is {value}; it must be {limit}.", field=name, value=value, limit=limit
    )
