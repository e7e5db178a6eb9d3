"""Chat messages, and the base's Jinja template that turns them into text.

The template comes from the operator with the base; contents come from strangers. What a content says can
never become a control token: characters of it that would form a special token are swapped for placeholders
while the template runs, so every special token in the rendered text is the template's own.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.common.errors import FailedPrecondition, InvalidArgument

ROLES: Final = ("system", "user", "assistant", "tool")
MAX_MESSAGES: Final = 1024
RENDER_LIMIT_SECONDS: Final = 1.0
RENDER_LIMIT_CHARS: Final = 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PRIVATE_USE = range(0x100000, 0x10FFFE)
_PLACEHOLDERS = re.compile("[\U00100000-\U0010fffd]")
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant turn makes: `arguments` is a JSON object, `id` may be empty."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        name: the participant's or the tool's, or empty.
        tool_calls: what an assistant turn calls; its content may be empty then.
        tool_call_id: on a tool's turn, the call that it answers, or empty.
    """

    role: str
    content: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


def check_messages(messages: Sequence[Message], *, field: str = "messages") -> None:
    """Refuse a conversation that no template should see.

    Raises:
        InvalidArgument: `bad_messages`, naming the message's index.
    """
    if not 1 <= len(messages) <= MAX_MESSAGES:
        message = f"{field} must hold 1 to {MAX_MESSAGES} messages, not {len(messages)}."
        raise InvalidArgument(
            "bad_messages", message, field=field, value=len(messages), limit=f"1 to {MAX_MESSAGES}"
        )
    for index, item in enumerate(messages):
        where = f"{field}[{index}]"
        if item.role not in ROLES:
            limit = ", ".join(ROLES)
            raise InvalidArgument(
                "bad_messages",
                f"{where}.role must be one of {limit}.",
                field=f"{where}.role",
                value=item.role,
                limit=limit,
            )
        if item.name and not _NAME.fullmatch(item.name):
            limit = "1 to 64 of A-Z a-z 0-9 _ -"
            raise InvalidArgument(
                "bad_messages",
                f"{where}.name must be {limit}.",
                field=f"{where}.name",
                value=item.name,
                limit=limit,
            )
        if not is_text(item.content):
            raise InvalidArgument(
                "bad_messages",
                f"{where}.content holds half a surrogate pair, which is not text.",
                field=f"{where}.content",
            )
        _check_tool_calls(item, where)
    if all(item.role == "system" for item in messages):
        message = f"{field} holds only system messages; at least one other turn is needed."
        raise InvalidArgument("bad_messages", message, field=f"{field}[{len(messages) - 1}].role")


def _check_tool_calls(message: Message, where: str) -> None:
    if message.tool_calls and message.role != "assistant":
        raise InvalidArgument(
            "bad_messages", f"{where}: only assistant turns call tools.", field=f"{where}.tool_calls"
        )
    if message.tool_call_id and message.role != "tool":
        raise InvalidArgument(
            "bad_messages", f"{where}: only tool turns answer a call.", field=f"{where}.tool_call_id"
        )
    for number, call in enumerate(message.tool_calls):
        field = f"{where}.tool_calls[{number}]"
        if not _NAME.fullmatch(call.name):
            limit = "1 to 64 of A-Z a-z 0-9 _ -"
            raise InvalidArgument(
                "bad_messages",
                f"{field}.name must be {limit}.",
                field=f"{field}.name",
                value=call.name,
                limit=limit,
            )
        if not is_text(call.id) or not is_text(_to_json(call.arguments)):
            raise InvalidArgument(
                "bad_messages", f"{field} holds half a surrogate pair, which is not text.", field=field
            )


def is_text(text: str) -> bool:
    """Return whether no half of a surrogate pair stands in `text`."""
    return text.isascii() or _SURROGATES.search(text) is None


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered text in which every special token is the template's own.

    `placeholders` maps each stand-in character to the character of a content that it stands for.
    """

    text: str
    placeholders: dict[int, str]

    @property
    def has_placeholders(self) -> bool:
        """Whether any of them may stand in the text."""
        return not self.text.isascii() and _PLACEHOLDERS.search(self.text) is not None


class ChatTemplate:
    """A chat template, compiled once, run sandboxed with limits of time and size."""

    def __init__(self, source: str, special_tokens: Sequence[str], names: dict[str, str]) -> None:
        """Compile `source`.

        Args:
            source: the Jinja template.
            special_tokens: every special token's text.
            names: what the template may refer to, such as `bos_token`.

        Raises:
            FailedPrecondition: `chat_template_failed` where it is not valid Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise _failed(error) from error
        self._names = names
        self._words = frozenset(re.findall(r"\b(?:name|tools|tool_calls)\b", source))
        self._guard = _Guard(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        placeholders_for: Sequence[Message] = (),
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Rendering:
        """Return the text of checked messages.

        Args:
            messages: the turns.
            add_generation_prompt: end with what opens an assistant turn.
            placeholders_for: choose placeholders that suit these messages too, so that several renderings can
                be compared.
            tools: JSON descriptions of the tools that the assistant may call.

        Raises:
            InvalidArgument: `bad_messages` where the template itself refuses them, `prompt_too_large`,
                `unsupported_parameter` for a `name`, `tools` or `tool_calls` that the template would leave
                out.
            FailedPrecondition: `chat_template_failed` where the template breaks or takes too long.
        """
        swaps = self._guard.placeholders(_texts(placeholders_for or messages, tools))
        turns = [self._turn(index, item, swaps) for index, item in enumerate(messages)]
        if tools:
            self._require_place_for("tools", "tools")
        text = self._run(turns, add_generation_prompt, self._guard.defuse_value(list(tools), swaps))
        return Rendering(text, {ord(stand_in): character for character, stand_in in swaps.items()})

    def _turn(self, index: int, message: Message, swaps: dict[str, str]) -> dict[str, Any]:
        turn: dict[str, Any] = {
            "role": message.role,
            "content": self._guard.defuse(message.content, swaps),
        }
        if message.name:
            self._require_place_for("name", f"messages[{index}].name")
            turn["name"] = message.name
        if message.tool_calls:
            self._require_place_for("tool_calls", f"messages[{index}].tool_calls")
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "id": self._guard.defuse(call.id, swaps),
                    "function": {
                        "name": call.name,
                        "arguments": self._guard.defuse_value(dict(call.arguments), swaps),
                    },
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id:
            turn["tool_call_id"] = self._guard.defuse(message.tool_call_id, swaps)
        return turn

    def _require_place_for(self, word: str, field: str) -> None:
        if word not in self._words:
            raise InvalidArgument(
                "unsupported_parameter", f"The base's chat template has no place for {field}.", field=field
            )

    def _run(self, turns: list[dict[str, Any]], add_generation_prompt: bool, tools: list[Any]) -> str:
        started = time.monotonic()
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=turns,
                add_generation_prompt=add_generation_prompt,
                tools=tools or None,
                **self._names,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > RENDER_LIMIT_CHARS:
                    raise InvalidArgument(
                        "prompt_too_large",
                        f"The rendered conversation exceeds {RENDER_LIMIT_CHARS} characters.",
                        field="messages",
                        limit=RENDER_LIMIT_CHARS,
                    )
                if time.monotonic() - started > RENDER_LIMIT_SECONDS:
                    raise FailedPrecondition(
                        "chat_template_failed",
                        f"The base's chat template ran for more than {RENDER_LIMIT_SECONDS:g} s.",
                        limit=RENDER_LIMIT_SECONDS,
                    )
        except _RefusedError as refusal:
            raise InvalidArgument(
                "bad_messages", f"The base's chat template refuses the messages: {refusal}", field="messages"
            ) from refusal
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise _failed(error) from error
        return "".join(pieces)


class _Guard:
    """Takes the power out of special tokens within contents."""

    def __init__(self, special_tokens: Sequence[str]) -> None:
        self._tokens = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._whole = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")
        # A content's end and the text after it could form a token together, and so could its beginning.
        self._heads = {token[:size] for token in self._tokens for size in range(1, len(token))}
        self._tails = {token[size:] for token in self._tokens for size in range(1, len(token))}
        self._longest = max(map(len, self._tokens), default=0)

    def placeholders(self, texts: Sequence[str]) -> dict[str, str]:
        """Return a stand-in, found in none of the texts, for each character that may need one."""
        used: set[str] = set().union(*texts)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        characters = dict.fromkeys(character for token in self._tokens for character in token)
        return dict(zip(characters, free, strict=False))

    def defuse(self, content: str, swaps: dict[str, str]) -> str:
        """Return `content` with one character swapped wherever it could take part in a special token."""
        content = self._whole.sub(lambda match: swaps[match[0][0]] + match[0][1:], content)
        while (match := self._whole.search(content)) is not None:
            content = content[: match.start()] + swaps[match[0][0]] + content[match.start() + 1 :]
        # Templates trim contents, so it is the first and last visible characters that count.
        start = len(content) - len(content.lstrip())
        end = len(content.rstrip())
        if start < end and any(content[start:end] in token for token in self._tokens):
            content = content[:start] + swaps[content[start]] + content[start + 1 :]
        while (position := self._open_end(content, start, end)) is not None:
            content = content[:position] + swaps[content[position]] + content[position + 1 :]
        while (position := self._open_start(content, start, end)) is not None:
            content = content[:position] + swaps[content[position]] + content[position + 1 :]
        return content

    def defuse_value(self, value: Any, swaps: dict[str, str]) -> Any:
        """Return a JSON value with every text in it, the keys included, as `defuse`."""
        if isinstance(value, str):
            return self.defuse(value, swaps)
        if isinstance(value, Mapping):
            return {self.defuse(key, swaps): self.defuse_value(item, swaps) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.defuse_value(item, swaps) for item in value]
        return value

    def _open_end(self, content: str, start: int, end: int) -> int | None:
        for size in range(min(self._longest - 1, end - start), 0, -1):
            if content[end - size : end] in self._heads:
                return end - size
        return None

    def _open_start(self, content: str, start: int, end: int) -> int | None:
        for size in range(min(self._longest - 1, end - start), 0, -1):
            if content[start : start + size] in self._tails:
                return start + size - 1
        return None


def _texts(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return every text that strangers wrote."""
    texts = [message.content for message in messages]
    for message in messages:
        texts.append(message.tool_call_id)
        texts += [call.id + _to_json(call.arguments) for call in message.tool_calls]
    return [*texts, *map(_to_json, tools)]


class _GenerationTag(Extension):
    """`{% generation %}`, with which templates mark what the assistant wrote: its body, as it stands."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it for instances.

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _RefusedError(TemplateError):
    """The template called `raise_exception`."""


def _raise_exception(message: object) -> None:
    raise _RefusedError(str(message))


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which would change the text.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _failed(error: Exception) -> FailedPrecondition:
    return FailedPrecondition(
        "chat_template_failed", f"The base's chat template failed: {type(error).__name__}: {error}"
    )
