"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from lorafleet.inference.v1.generation_pb2 import ChatMessage, ChatPrompt
from services.gateway.json_body import Body, field_error
from services.gateway.metering import about_tokens
from services.gateway.sampling import MAX_ALTERNATIVES, GenerationFields, MaxTokens

MAX_MESSAGES = 1024


class TextPart(Body):
    """One part of a message; only text can be read."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message. `developer` is OpenAI's newer word for `system`."""

    unsupported: ClassVar[frozenset[str]] = frozenset(
        {"annotations", "audio", "function_call", "refusal", "tool_call_id", "tool_calls"}
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None

    @property
    def text(self) -> str:
        """The content; text parts are put together."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def message(self) -> ChatMessage:
        """Return the message for inference."""
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(role=role, content=self.text, name=self.name or "")


class TextFormat(Body):
    """The only response format there is."""

    type: Literal["text"]


class ChatRequest(GenerationFields):
    """A conversation to go on with.

    `max_completion_tokens` is the newer name of `max_tokens`; both may be given only when they agree. Absent,
    a completion may use all of the context that is left.
    """

    unsupported: ClassVar[frozenset[str]] = frozenset(
        {
            "audio",
            "chat_template",
            "chat_template_kwargs",
            "function_call",
            "functions",
            "moderation",
            "parallel_tool_calls",
            "prediction",
            "prompt_cache_options",
            "prompt_cache_retention",
            "reasoning_effort",
            "tool_choice",
            "tools",
            "verbosity",
            "web_search_options",
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    response_format: TextFormat | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "top_logprobs is only allowed with logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise field_error("max_completion_tokens", "max_tokens is the same limit, and differs")
        if all(message.role in ("system", "developer") for message in self.messages):
            last = f"messages[{len(self.messages) - 1}]"
            raise field_error(last, f"{last}: there are only system messages, so nothing to answer")
        return self

    @property
    def completion_limit(self) -> int | None:
        """Most tokens of one completion; None for all of the context that is left."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives each token is reported with; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def about_tokens(self) -> int:
        """About how many tokens the request will use."""
        text_bytes = sum(len(message.text.encode()) for message in self.messages)
        return about_tokens(text_bytes=text_bytes, completions=self.completions, limit=self.completion_limit)

    def prompt(self) -> ChatPrompt:
        """Return the conversation for inference."""
        return ChatPrompt(messages=[message.message() for message in self.messages])
