"""Conversations of the contract, with their tools, as the base's template takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafleet.inference.v1.generation_pb2 import ChatMessage, ChatPrompt
from services.common.adapter_format.strict_json import StrictJsonError, parse_object
from services.common.chat_template import Message, ToolCall
from services.common.errors import InvalidArgument
from services.common.prompts import PromptEncoder

MAX_TOOLS = 128
MAX_TOOL_BYTES = 64 * 1024
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, unchecked but for their JSON, and the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, chat: ChatPrompt) -> Conversation:
        """Return what a prompt says.

        Raises:
            InvalidArgument: `bad_messages` or `invalid_value` for tools that are no JSON objects or too many.
        """
        _check_number(len(chat.tools), "tools", "invalid_value")
        tools = tuple(
            _json_object(text, f"tools[{index}]", "invalid_value") for index, text in enumerate(chat.tools)
        )
        return cls(tuple(_message(item, index) for index, item in enumerate(chat.messages)), tools)

    def encode(self, encoder: PromptEncoder) -> list[int]:
        """Return the conversation's token ids, up to where the assistant is to go on.

        Raises:
            LorafleetError: as `PromptEncoder.encode_chat`.
        """
        return encoder.encode_chat(self.messages, tools=self.tools)


def _message(message: ChatMessage, index: int) -> Message:
    field = f"messages[{index}].tool_calls"
    _check_number(len(message.tool_calls), field, "bad_messages")
    calls = tuple(
        ToolCall(
            call.name, _json_object(call.arguments, f"{field}[{number}].arguments", "bad_messages"), call.id
        )
        for number, call in enumerate(message.tool_calls)
    )
    return Message(message.role, message.content, message.name, calls, message.tool_call_id)


def _check_number(number: int, field: str, reason: str) -> None:
    if number > MAX_TOOLS:
        raise InvalidArgument(
            reason, f"{field} has {number} entries.", field=field, value=number, limit=f"at most {MAX_TOOLS}"
        )


def _json_object(text: str, field: str, reason: str) -> dict[str, Any]:
    data = text.encode()
    limit = f"a JSON object of at most {MAX_TOOL_BYTES} bytes and {_MAX_DEPTH} levels"
    if len(data) > MAX_TOOL_BYTES:
        raise InvalidArgument(reason, f"{field} is too long.", field=field, value=len(data), limit=limit)
    try:
        return parse_object(data, max_depth=_MAX_DEPTH)
    except StrictJsonError as error:
        raise InvalidArgument(
            reason, f"{field}: {error}.", field=field, value=text[:100], limit=limit
        ) from error
