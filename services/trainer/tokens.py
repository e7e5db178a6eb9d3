"""From rows to token ids with a mask of the tokens that count in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from services.common.chat_template import Message, ToolCall
from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.prompts import PromptEncoder
from services.trainer.dataset import ConversationRow, InstructionRow, LineError, PromptRow, Row, TextRow
from services.trainer.spec import LossScope

_LOOK_AHEAD = "template_not_prefix_preserving"


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row as the model sees it.

    Attributes:
        ids: token ids, the stop token included.
        supervised: for each id whether it counts in the loss; the first never does, nothing predicts it.
        prompt_length: ids before the last answer; serving them alone asks for that answer.
        source: the row it came from.
    """

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    prompt_length: int
    source: Row

    @property
    def num_supervised(self) -> int:
        """Tokens that count in the loss."""
        return sum(self.supervised)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as arrays, on its way to the disk.

    Attributes:
        ids: int32 [tokens].
        supervised: bool [tokens].
        prompt_length: as `TokenRow`.
        stops: whether the last token that counts is one that ends an answer.
        is_prefix_kept: whether what serving sends for the last answer is a prefix of `ids`.
        is_last_turn_only: whether earlier answers are not learned, because the template changes them later.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    prompt_length: int
    stops: bool = True
    is_prefix_kept: bool = True
    is_last_turn_only: bool = False

    @property
    def num_supervised(self) -> int:
        """Tokens that count in the loss."""
        return int(self.supervised.sum())


class RowEncoder:
    """Encodes rows for one base and one choice of what is learned."""

    def __init__(self, encoder: PromptEncoder, loss_scope: LossScope) -> None:
        self._encoder = encoder
        self._loss_scope = loss_scope
        # What the tokenizer puts before every text stays when the text behind it is cut.
        self._begin = np.array(encoder.encode_text(""), dtype=np.int32)

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow | LineError]:
        """Return each row as tokens, or what is wrong with it.

        Special tokens inside texts are encoded as text. A prompt row is prompt + completion +
        end-of-sequence, with prompt and completion encoded apart, so that the prompt alone is a prefix of it.
        """
        results: list[EncodedRow | LineError | None] = [None] * len(rows)
        pairs: dict[int, tuple[str, str]] = {}
        texts: dict[int, str] = {}
        for index, row in enumerate(rows):
            if isinstance(row, TextRow):
                texts[index] = row.text
            elif isinstance(row, PromptRow):
                pairs[index] = (row.prompt, row.completion)
            elif isinstance(row, InstructionRow) and not self._encoder.has_chat_template:
                pairs[index] = (row.prompt, row.answer)
            else:
                results[index] = self._finished_chat(row)
        stop = [stop_token_id(self._encoder)] if pairs or texts else []
        prompts = self._encoder.encode_texts([prompt for prompt, _ in pairs.values()])
        completions = self._encoder.encode_completions([completion for _, completion in pairs.values()])
        for index, prompt, completion in zip(pairs, prompts, completions, strict=True):
            results[index] = self._finished(prompt + completion + stop, len(prompt))
        for index, ids in zip(texts, self._encoder.encode_texts(list(texts.values())), strict=True):
            results[index] = self._finished(ids + stop, len(self._begin))
        return [result for result in results if result is not None]

    def cut(self, row: EncodedRow, max_seq_len: int) -> EncodedRow | None:
        """Return the row with at most `max_seq_len` tokens, or None where its last answer does not fit.

        A prompt is cut on the left, behind what the tokenizer puts before every text. A text without a prompt
        is cut on the right.
        """
        begin = self._begin if np.array_equal(row.ids[: len(self._begin)], self._begin) else self._begin[:0]
        if row.prompt_length <= len(begin):
            return replace(
                row, ids=row.ids[:max_seq_len], supervised=row.supervised[:max_seq_len], stops=False
            )
        removed = len(row.ids) - max_seq_len
        first = len(begin) + removed
        if first >= row.prompt_length:
            return None
        supervised = np.concatenate((np.zeros(len(begin), dtype=np.bool_), row.supervised[first:]))
        supervised[0] = False
        ids = np.concatenate((begin, row.ids[first:]))
        return replace(row, ids=ids, supervised=supervised, prompt_length=row.prompt_length - removed)

    def _finished(self, ids: list[int], prompt_length: int) -> EncodedRow | LineError:
        supervised = np.zeros(len(ids), dtype=np.bool_)
        supervised[0 if self._loss_scope is LossScope.ALL else prompt_length :] = True
        return self._checked(EncodedRow(np.array(ids, dtype=np.int32), supervised, prompt_length))

    def _finished_chat(self, row: ConversationRow | InstructionRow) -> EncodedRow | LineError:
        try:
            encoded = self._chat(row)
        except (InvalidArgument, FailedPrecondition) as error:
            if error.reason == "chat_template_failed":
                raise
            return LineError(error.reason, error.message, field=error.field or "")
        if self._loss_scope is LossScope.ALL:
            encoded.supervised[:] = True
        return self._checked(encoded)

    def _chat(self, row: ConversationRow | InstructionRow) -> EncodedRow:
        messages = [_message(message) for message in row.messages]
        tools = row.tools if isinstance(row, ConversationRow) else ()
        learned = [
            index
            for index, message in enumerate(row.messages)
            if message["role"] == "assistant" and message.get("weight", 1) == 1
        ]
        last = len(messages) - 1
        is_last_only = False
        try:
            ids, mask = self._encoder.encode_chat_training(messages, learned_turns=learned, tools=tools)
        except FailedPrecondition as error:
            if error.reason != _LOOK_AHEAD or last not in learned:
                raise
            # Templates that drop an earlier turn's thoughts, say: its text is not what was answered then.
            ids, mask = self._encoder.encode_chat_training(messages, learned_turns=[last], tools=tools)
            is_last_only = learned != [last]
        prompt = self._encoder.encode_chat(messages[:-1], add_generation_prompt=True, tools=tools)
        supervised = np.array(mask, dtype=np.bool_)
        counted = np.flatnonzero(supervised)
        return EncodedRow(
            np.array(ids, dtype=np.int32),
            supervised,
            min(len(prompt), len(ids) - 1),
            stops=bool(len(counted)) and ids[counted[-1]] in self._encoder.eos_token_ids,
            is_prefix_kept=ids[: len(prompt)] == prompt,
            is_last_turn_only=is_last_only,
        )

    def _checked(self, row: EncodedRow) -> EncodedRow | LineError:
        # Nothing stands before the first token to predict it from.
        row.supervised[0] = False
        if not row.supervised.any():
            text = "no token of the row counts in the loss; give it an answer that is learned"
            return LineError("no_supervised_tokens", text)
        return row


def stop_token_id(encoder: PromptEncoder) -> int:
    """Return the token that ends a plain completion: the lowest of the base's end tokens.

    Raises:
        FailedPrecondition: `no_stop_token`, where the base has none.
    """
    if not encoder.eos_token_ids:
        raise FailedPrecondition("no_stop_token", "the base has no end-of-sequence token")
    return min(encoder.eos_token_ids)


def _message(message: dict[str, object]) -> Message:
    calls = message.get("tool_calls", ())
    assert isinstance(calls, list | tuple)
    return Message(
        role=str(message["role"]),
        content=str(message["content"]),
        name=str(message.get("name", "")),
        tool_calls=tuple(ToolCall(call["name"], call["arguments"], call["id"]) for call in calls),
        tool_call_id=str(message.get("tool_call_id", "")),
    )


def text_size(row: Row) -> int:
    """Return about how many characters of text a row holds, to bound what is encoded at once."""
    if isinstance(row, TextRow):
        return len(row.text)
    if isinstance(row, PromptRow):
        return len(row.prompt) + len(row.completion)
    return sum(len(message["content"]) for message in row.messages)
