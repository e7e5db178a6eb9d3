"""What the objects of OpenAI's API look like in our answers: every key, and no other."""

from __future__ import annotations

from typing import Any, Generic, Literal, NotRequired, TypeVar

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

ItemT = TypeVar("ItemT")
closed = with_config(ConfigDict(extra="forbid"))


@closed
class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


@closed
class Error(TypedDict):
    """An error. `code` is stable and is what programs match on."""

    error: ErrorDetail


@closed
class ListOf(TypedDict, Generic[ItemT]):
    """A whole list."""

    object: Literal["list"]
    data: list[ItemT]


@closed
class PageOf(TypedDict, Generic[ItemT]):
    """A page of a list; `last_id` is the next page's `after`."""

    object: Literal["list"]
    data: list[ItemT]
    first_id: str | None
    last_id: str | None
    has_more: bool


@closed
class Deleted(TypedDict):
    id: str
    object: str
    deleted: Literal[True]


@closed
class Health(TypedDict):
    status: Literal["ok"]


Word = Literal["serving", "not_serving", "unreachable"]


@closed
class Services(TypedDict):
    registry: Word
    trainer: Word
    inference: Word


@closed
class Readiness(TypedDict):
    status: Literal["ready", "not_ready"]
    services: Services


@closed
class Model(TypedDict):
    """A model; `root` is the version behind the name, `parent` its base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


@closed
class CachedTokens(TypedDict):
    cached_tokens: int


@closed
class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


@closed
class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


@closed
class CompletionChoice(TypedDict):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


@closed
class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


@closed
class CompletionChunkChoice(TypedDict):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


@closed
class CompletionChunk(TypedDict):
    """One event of a stream; with `stream_options.include_usage` the last one has no choices."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage | None]


@closed
class ChatToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


@closed
class ChatTopToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatToken]


@closed
class ChatLogprobs(TypedDict):
    content: list[ChatTopToken]
    refusal: None


@closed
class FunctionCall(TypedDict):
    name: str
    arguments: str


@closed
class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


@closed
class ToolCallDelta(TypedDict):
    index: int
    id: str
    type: Literal["function"]
    function: FunctionCall


@closed
class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


@closed
class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


@closed
class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


@closed
class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    refusal: NotRequired[None]
    tool_calls: NotRequired[list[ToolCallDelta]]


@closed
class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


@closed
class ChatChunk(TypedDict):
    """One event of a stream; with `stream_options.include_usage` the last one has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


@closed
class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


@closed
class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


@closed
class Embeddings(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@closed
class File(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: None
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: Literal["processed"]
    status_details: None


@closed
class Upload(TypedDict):
    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: File | None


@closed
class UploadPart(TypedDict):
    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


@closed
class JobHyperparameters(TypedDict):
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]
    n_epochs: int | Literal["auto"]


@closed
class JobSupervision(TypedDict):
    hyperparameters: JobHyperparameters
    lorafleet: dict[str, Any]


@closed
class JobMethod(TypedDict):
    type: Literal["supervised"]
    supervised: JobSupervision


@closed
class JobError(TypedDict):
    code: str
    message: str
    param: str | None


@closed
class Job(TypedDict):
    """A fine-tuning job; what OpenAI's object has no place for is in `lorafleet`."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    hyperparameters: JobHyperparameters
    method: JobMethod
    seed: int
    estimated_finish: int | None
    integrations: list[Any]
    metadata: dict[str, str]
    error: JobError | None
    lorafleet: dict[str, Any]


@closed
class JobEvent(TypedDict):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


@closed
class CheckpointMetrics(TypedDict):
    step: int
    train_loss: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None


@closed
class Checkpoint(TypedDict):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: CheckpointMetrics
