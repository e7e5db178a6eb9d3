"""One row of a training file, whichever schema it came in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A text and what is to follow it."""

    line: int
    prompt: str
    completion: str

    @property
    def answer(self) -> str:
        """What is to be answered."""
        return self.completion

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content; equal rows have equal digests."""
        return _digest(["p", self.prompt, self.completion])

    @property
    def prompt_digest(self) -> bytes:
        """SHA-256 of what the model is given."""
        return _digest(["p", self.prompt])


@dataclass(frozen=True, slots=True)
class TextRow:
    """A text that is learnt as it stands."""

    line: int
    text: str

    @property
    def answer(self) -> str:
        """The text: nothing of it is given."""
        return self.text

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content; equal rows have equal digests."""
        return _digest(["t", self.text])

    @property
    def prompt_digest(self) -> bytes:
        """As `digest`: equal texts stay together."""
        return self.digest


@dataclass(frozen=True, slots=True)
class ConversationRow:
    """A conversation that ends with the assistant.

    Attributes:
        messages: in OpenAI's shape, checked: `role`, `content` (text), perhaps `name`, `weight`,
            `tool_calls` (with `arguments` as an object) and `tool_call_id`.
        tools: JSON descriptions of the tools that the assistant may call.
    """

    line: int
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def answer(self) -> str:
        """What the assistant says last."""
        return str(self.messages[-1]["content"])

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content; equal rows have equal digests."""
        return _digest(["m", self.messages, self.tools])

    @property
    def prompt_digest(self) -> bytes:
        """SHA-256 of what the model is given before its last turn."""
        return _digest(["m", self.messages[:-1], self.tools])


@dataclass(frozen=True, slots=True)
class InstructionRow:
    """An Alpaca row: an instruction, perhaps an input to it, and the output.

    On a base with a chat template it is trained as the conversation `messages`, on one without as the text
    `prompt` and what follows it.
    """

    line: int
    messages: tuple[dict[str, Any], ...]
    instruction: str
    input: str

    @property
    def answer(self) -> str:
        """The output."""
        return str(self.messages[-1]["content"])

    @property
    def prompt(self) -> str:
        """What a base without a chat template is given: each turn under a heading of its own."""
        headings = {"system": "System", "user": "Instruction", "assistant": "Response"}
        parts = [f"### {headings[m['role']]}:\n{m['content']}\n\n" for m in self.messages[:-2]]
        parts.append(f"### Instruction:\n{self.instruction}\n\n")
        if self.input:
            parts.append(f"### Input:\n{self.input}\n\n")
        return "".join(parts) + "### Response:\n"

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content; equal rows have equal digests."""
        return _digest(["i", self.messages, self.input])

    @property
    def prompt_digest(self) -> bytes:
        """SHA-256 of what the model is given before its last turn."""
        return _digest(["i", self.messages[:-1], self.input])


Row = PromptRow | TextRow | ConversationRow | InstructionRow


def _digest(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode("ascii")).digest()
