"""What LoRAX's objects and our own look like in our answers: every key, and no other."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from services.gateway.document.shapes import Usage, closed


@closed
class LoraxError(TypedDict):
    error: str
    error_type: str


@closed
class LoraxInputToken(TypedDict):
    id: int
    text: str
    logprob: float | None


@closed
class LoraxToken(TypedDict):
    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool
    alternative_tokens: NotRequired[list[LoraxInputToken]]


Finish = Literal["length", "eos_token", "stop_sequence"]


@closed
class LoraxSequence(TypedDict):
    generated_text: str
    finish_reason: Finish
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: list[LoraxInputToken]
    tokens: list[LoraxToken]


@closed
class LoraxDetails(TypedDict):
    finish_reason: Finish
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None
    prefill: list[LoraxInputToken]
    tokens: list[LoraxToken]
    best_of_sequences: NotRequired[list[LoraxSequence]]


@closed
class LoraxAnswer(TypedDict):
    generated_text: str
    details: NotRequired[LoraxDetails]


@closed
class LoraxStreamDetails(TypedDict):
    finish_reason: Finish
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


@closed
class LoraxEvent(TypedDict):
    """One token; the last event has the whole text and how it ended."""

    token: LoraxToken
    generated_text: str | None
    details: LoraxStreamDetails | None


@closed
class LoraxPlace(TypedDict):
    id: int
    text: str
    start: int
    stop: int


@closed
class LoraxInfo(TypedDict):
    model_id: str
    model_sha: str
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: Literal["text-generation"]
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    version: str
    sha: None
    docker_label: None


@closed
class ComparedAnswer(TypedDict):
    """One model's answer; `version` and `digest` are null for the base."""

    object: Literal["comparison.answer"]
    model: str
    version: str | None
    digest: str | None
    text: str
    finish_reason: Literal["stop", "length"]
    mean_logprob: float | None
    usage: Usage


@closed
class Key(TypedDict):
    """An API key without its secret."""

    id: str
    object: Literal["key"]
    name: str
    tenant: str
    scopes: list[str]
    created_at: int
    expires_at: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None


@closed
class MadeKey(Key):
    """A key that was just made; `key` is shown this once."""

    key: str


@closed
class UsageSum(TypedDict):
    """Sums of one group, which is named as `group_by` says."""

    object: Literal["usage"]
    day: NotRequired[str]
    key: NotRequired[str]
    adapter: NotRequired[str]
    group: NotRequired[Literal["all"]]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    total_tokens: int


@closed
class UsageReport(TypedDict):
    object: Literal["list"]
    start: str
    end: str
    data: list[UsageSum]
