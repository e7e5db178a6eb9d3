"""From rows to token ids with a mask of the tokens that count in the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.common.chat_template import Message
from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.prompts import PromptEncoder
from services.trainer.dataset import ConversationRow, FaultList, LineError, PromptRow, Row
from services.trainer.spec import LossScope, OverlongPolicy


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
class TokenSet:
    """The rows of one file as tokens, after the overlong policy.

    Attributes:
        overlong_rows: rows that were longer than allowed.
        truncated_rows: of those, the ones cut on the left.
        max_row_tokens: longest row before the policy.
    """

    rows: tuple[TokenRow, ...]
    overlong_rows: int
    truncated_rows: int
    max_row_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the rows."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def supervised_tokens(self) -> int:
        """Tokens of one pass that count in the loss."""
        return sum(row.num_supervised for row in self.rows)


def tokenize(
    rows: Sequence[Row],
    encoder: PromptEncoder,
    *,
    max_seq_len: int,
    overlong_policy: OverlongPolicy,
    loss_scope: LossScope,
    field: str = "training_file",
    check: Callable[[], None] = lambda: None,
) -> TokenSet:
    """Return `rows` as tokens.

    Special tokens inside texts are encoded as text. A prompt row is prompt + completion + end-of-sequence,
    with prompt and completion encoded apart, so that the prompt alone is a prefix of it.

    Args:
        encoder: the base's tokenizer and chat template.
        max_seq_len: longest row in tokens.
        overlong_policy: what happens to longer ones. TRUNCATE drops rows whose answer alone does not fit.
        loss_scope: which tokens count.
        field: request field that named the file, for the error.
        check: called between rows; raises to give up.

    Raises:
        InvalidArgument: `invalid_dataset` with `example_too_long`, `no_chat_template` or `bad_messages`.
    """
    faults = FaultList(field)
    if rows and not isinstance(rows[0], PromptRow) and not encoder.has_chat_template:
        text = "the base has no chat template; use prompt and completion rows"
        faults.add(LineError("no_chat_template", text))
        faults.raise_if_any()
    # What the tokenizer puts before every text stays when the text behind it is cut.
    begin = tuple(encoder.encode_text(""))
    kept: list[TokenRow] = []
    overlong: list[TokenRow] = []
    truncated = 0
    longest = 0
    for row in rows:
        check()
        try:
            encoded = _encode(row, encoder, loss_scope)
        except LineError as fault:
            faults.add(fault, row.line)
            continue
        longest = max(longest, len(encoded.ids))
        if len(encoded.ids) <= max_seq_len:
            kept.append(encoded)
            continue
        overlong.append(encoded)
        if overlong_policy is OverlongPolicy.TRUNCATE:
            cut = _cut_left(encoded, max_seq_len, begin=begin)
            if cut is not None:
                truncated += 1
                kept.append(cut)
    faults.raise_if_any()
    if overlong and overlong_policy is OverlongPolicy.REJECT:
        _refuse_overlong(overlong, max_seq_len, faults)
    if not kept:
        faults.add(LineError("empty_dataset", f"no row fits in {max_seq_len} tokens; raise max_seq_len"))
        faults.raise_if_any()
    return TokenSet(tuple(kept), len(overlong), truncated, longest)


def stop_token_id(encoder: PromptEncoder) -> int:
    """Return the token that ends a plain completion: the lowest of the base's end tokens.

    Raises:
        FailedPrecondition: `no_stop_token`, where the base has none.
    """
    if not encoder.eos_token_ids:
        raise FailedPrecondition("no_stop_token", "the base has no end-of-sequence token")
    return min(encoder.eos_token_ids)


def _encode(row: Row, encoder: PromptEncoder, loss_scope: LossScope) -> TokenRow:
    try:
        if isinstance(row, PromptRow):
            prompt = encoder.encode_text(row.prompt)
            completion = [*encoder.encode_completion(row.completion), stop_token_id(encoder)]
            ids, mask = prompt + completion, [False] * len(prompt) + [True] * len(completion)
        else:
            messages = [Message(message["role"], message["content"]) for message in row.messages]
            ids, mask = encoder.encode_chat_training(messages)
            mask = _weighted(mask, row)
            prompt = encoder.encode_chat(messages[:-1], add_generation_prompt=True)
    except InvalidArgument as error:
        raise LineError(error.reason, error.message, field=error.field or "") from error
    if loss_scope is LossScope.ALL:
        mask = [True] * len(ids)
    # Nothing stands before the first token to predict it from.
    mask[0] = False
    if not any(mask):
        raise LineError("no_supervised_tokens", "no token of the row counts in the loss")
    return TokenRow(tuple(ids), tuple(mask), len(prompt), row)


def _weighted(mask: list[bool], row: ConversationRow) -> list[bool]:
    """Return `mask` without the assistant turns of weight 0; each turn is one run of the mask."""
    weights = [message.get("weight", 1) for message in row.messages if message["role"] == "assistant"]
    if all(weights):
        return mask
    starts = [i for i, learned in enumerate(mask) if learned and (i == 0 or not mask[i - 1])]
    if len(starts) != len(weights):
        text = "the chat template writes nothing between two assistant turns, so weight cannot be honoured"
        raise LineError("bad_messages", text, field="messages")
    run = -1
    result = []
    for position, learned in enumerate(mask):
        run += run + 1 < len(starts) and starts[run + 1] == position
        result.append(learned and weights[run] == 1)
    return result


def _cut_left(row: TokenRow, max_seq_len: int, *, begin: tuple[int, ...]) -> TokenRow | None:
    """Return the row without its first tokens, or None where the last answer does not fit whole.

    The tokens `begin` stay where the row begins with them.
    """
    kept = begin if row.ids[: len(begin)] == begin else ()
    removed = len(row.ids) - max_seq_len
    if len(kept) + removed >= row.prompt_length:
        return None
    first = len(kept) + removed
    ids = (*kept, *row.ids[first:])
    mask = (*(False for _ in kept), *row.supervised[first:])
    return TokenRow(ids, (False, *mask[1:]), row.prompt_length - removed, row.source)


def _refuse_overlong(overlong: list[TokenRow], max_seq_len: int, faults: FaultList) -> None:
    worst = max(overlong, key=lambda row: len(row.ids))
    ordered = [worst, *(row for row in overlong if row is not worst)]
    for row in ordered:
        text = f"{len(row.ids)} tokens, at most {max_seq_len}; shorten it or set overlong_policy"
        faults.add(LineError("example_too_long", text), row.source.line)
    faults.raise_if_any()
