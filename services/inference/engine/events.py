"""What a step says about one sequence."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from services.common.errors import LorafleetError


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability under the model, before penalties and temperature, and the likeliest
    others.

    `top` holds (token id, log-probability) in falling order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step added to one sequence of a request.

    Attributes:
        index: which of the request's n sequences.
        token_ids: tokens chosen in this step; the one that stopped the sequence is among them.
        text: text that is now certain. It may lag behind the tokens: bytes of an unfinished character and the
            beginning of a possible stop string are held back until they are decided.
        logprobs: one for each of `token_ids`, if asked for.
        prompt_logprobs: for every prompt token but the first, once, on the first event of sequence 0, if
            asked for.
        embedding: the mean [hidden] of the prompt's last hidden states, on the last event, if asked for.
        finish_reason: set on the last event of the sequence.
        stop_cause: the stop string or the token id that ended it, with STOP.
        error: why, with ERROR.
        prompt_tokens: length of the prompt.
        completion_tokens: tokens of this sequence so far.
        cached_tokens: tokens of the prompt that were found computed when the request came.
        queue_seconds: how long the sequence waited before it first ran.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    embedding: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_cause: str | int | None = None
    error: LorafleetError | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_seconds: float = 0.0
