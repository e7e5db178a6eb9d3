"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from lorafleet.inference.v1.generation_pb2 import ChatMessage, ChatPrompt, ToolCall
from services.gateway.json_body import Body, field_error
from services.gateway.metering import about_tokens
from services.gateway.response_format import ResponseFormat
from services.gateway.sampling import MAX_ALTERNATIVES, GenerationFields, MaxTokens
from services.gateway.tools import MAX_TOOLS, NamedTool, PastCall, Tool, ToolChoice, call_schema

MAX_MESSAGES = 1024


class TextPart(Body):
    """One part of a message; only text can be read."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message. `developer` is OpenAI's newer word for `system`.

    An assistant's content may be null where it calls tools.
    """

    unsupported: ClassVar[frozenset[str]] = frozenset({"annotations", "audio", "function_call", "refusal"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    tool_calls: Annotated[list[PastCall], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            is_absent = "content" not in self.model_fields_set
            reason = "missing_required_parameter" if is_absent else "invalid_value"
            raise field_error("content", "content must be text, unless tools are called", reason=reason)
        return self

    @property
    def text(self) -> str:
        """The content; text parts are put together."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def message(self) -> ChatMessage:
        """Return the message for inference."""
        role = "system" if self.role == "developer" else self.role
        calls = [
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in self.tool_calls or ()
        ]
        return ChatMessage(
            role=role,
            content=self.text,
            name=self.name or "",
            tool_calls=calls,
            tool_call_id=self.tool_call_id or "",
        )


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
            "prediction",
            "prompt_cache_options",
            "prompt_cache_retention",
            "reasoning_effort",
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
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

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

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise field_error("tools", "two tools have the same name")
        if not self.tools:
            for field in ("tool_choice", "parallel_tool_calls"):
                if getattr(self, field) is not None:
                    raise field_error(field, f"{field} is only allowed with tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise field_error("tool_choice.function.name", "no tool has this name")
        if self.forced_tools and self.response_format_schema is not None:
            raise field_error("response_format", "an answer cannot be JSON of a schema and a call at once")
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that this answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tools(self) -> list[Tool]:
        """The tools of which this answer must call one; none where it may also be text."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or () if tool.function.name == self.tool_choice.function.name]
        return list(self.tools or ()) if self.tool_choice == "required" else []

    @property
    def response_format_schema(self) -> str | None:
        """The schema that `response_format` asks for."""
        return None if self.response_format is None else self.response_format.json_schema_text

    @property
    def json_schema(self) -> str | None:
        """The schema that the answer is constrained to; None where it is free."""
        return call_schema(self.forced_tools) if self.forced_tools else self.response_format_schema

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
        """Return the conversation for inference, with the tools that may be called."""
        return ChatPrompt(
            messages=[message.message() for message in self.messages],
            tools=[tool.as_json() for tool in self.callable_tools],
        )
