"""From what a caller asks for to the engine's sampling parameters, within the ranges of the contract."""

from __future__ import annotations

import math
from types import MappingProxyType

from lorafleet.inference.v1.generation_pb2 import GenerateRequest
from lorafleet.inference.v1.generation_pb2 import SamplingParams as SamplingMessage
from services.common.errors import InvalidArgument
from services.inference.constraints.grammar import ConstraintKind
from services.inference.engine.request import SamplingParams

MAX_COMPLETIONS = 16
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 16
MAX_LOGIT_BIASES = 1024
MAX_ALTERNATIVES = 20
MAX_PRIORITY = 100


def sampling_params(message: SamplingMessage, *, vocab_size: int) -> SamplingParams:
    """Return the engine's parameters; absent fields take the defaults of the contract.

    Raises:
        InvalidArgument: `invalid_value`, with field, value and range.
    """
    params = SamplingParams(
        max_tokens=_optional_count(message, "max_tokens", 1, None),
        temperature=_number(message, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(message, "top_p", 1.0, 0.0, 1.0, above=True),
        top_k=_optional_count(message, "top_k", 0, vocab_size) or 0,
        min_p=_number(message, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(message, "repetition_penalty", 1.0, 0.0, 2.0, above=True),
        presence_penalty=_number(message, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=_number(message, "frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=MappingProxyType(_logit_bias(message, vocab_size)),
        seed=message.seed if message.HasField("seed") else None,
        logprobs=_optional_count(message, "logprobs", 0, MAX_ALTERNATIVES),
        prompt_logprobs=_optional_count(message, "prompt_logprobs", 0, MAX_ALTERNATIVES),
        stop=_stops(message),
        stop_token_ids=_stop_token_ids(message, vocab_size),
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        n=_completions(message),
    )
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise _invalid("sampling.min_tokens", params.min_tokens, f"0 to max_tokens, {params.max_tokens}")
    return params


def priority(request: GenerateRequest) -> int:
    """Return the request's priority among those of its tenant.

    Raises:
        InvalidArgument: `invalid_value`.
    """
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise _invalid("priority", request.priority, f"-{MAX_PRIORITY} to {MAX_PRIORITY}")
    return request.priority


def constraint(message: SamplingMessage) -> tuple[ConstraintKind, str] | None:
    """Return what every output must fit, unread, or None.

    Raises:
        InvalidArgument: `invalid_value` for anything else that would decide where the output ends.
    """
    name = message.WhichOneof("constraint")
    if name is None:
        return None
    for field in ("stop", "stop_token_ids", "min_tokens", "ignore_eos"):
        value = getattr(message, field)
        if value:
            raise _invalid(f"sampling.{field}", value, f"absent beside {name}, which decides where to end")
    text: str = getattr(message, name)
    return ConstraintKind(name), text


def check_token_ids(token_ids: list[int], *, field: str, vocab_size: int) -> None:
    """Refuse ids that the base does not have.

    Raises:
        InvalidArgument: `invalid_value`.
    """
    for index, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            raise _invalid(f"{field}[{index}]", token_id, f"0 to {vocab_size - 1}")


def check_size(text: str, *, field: str, longest_token_bytes: int, max_model_len: int) -> None:
    """Refuse a text that cannot fit however it is encoded, before time is spent on encoding it.

    Raises:
        InvalidArgument: `context_length_exceeded` with the least tokens that it has, and the limit.
    """
    # A character has at least one byte.
    least_tokens = len(text) // longest_token_bytes
    if least_tokens > max_model_len:
        raise InvalidArgument(
            "context_length_exceeded",
            f"{field} has at least {least_tokens} tokens; the context holds {max_model_len}.",
            field=field,
            value=least_tokens,
            limit=max_model_len,
        )


def check_room(params: SamplingParams, prompt_tokens: int, *, max_model_len: int) -> None:
    """Refuse a prompt that leaves too little room.

    Raises:
        InvalidArgument: `context_length_exceeded` with the tokens wanted and the limit, `invalid_value` for
            an empty prompt or a `min_tokens` above the room.
    """
    if prompt_tokens == 0:
        raise InvalidArgument(
            "invalid_value", "The prompt has no tokens.", field="prompt", limit="at least 1"
        )
    wanted = prompt_tokens + (1 if params.max_tokens is None else params.max_tokens)
    if wanted > max_model_len:
        asked = "at least 1" if params.max_tokens is None else str(params.max_tokens)
        raise InvalidArgument(
            "context_length_exceeded",
            f"The prompt has {prompt_tokens} tokens and {asked} more are wanted, {wanted} in all; "
            f"the context holds {max_model_len}.",
            field="sampling.max_tokens" if prompt_tokens < max_model_len else "prompt",
            value=wanted,
            limit=max_model_len,
        )
    room = max_model_len - prompt_tokens
    if params.min_tokens > room:
        raise _invalid("sampling.min_tokens", params.min_tokens, f"0 to the room left, {room}")


def _optional_count(message: SamplingMessage, name: str, low: int, high: int | None) -> int | None:
    if not message.HasField(name):  # type: ignore[arg-type]
        return None
    value: int = getattr(message, name)
    if value < low or (high is not None and value > high):
        raise _invalid(f"sampling.{name}", value, f"at least {low}" if high is None else f"{low} to {high}")
    return value


def _number(
    message: SamplingMessage, name: str, default: float, low: float, high: float, *, above: bool = False
) -> float:
    if not message.HasField(name):  # type: ignore[arg-type]
        return default
    value: float = getattr(message, name)
    # Written so that NaN, for which every comparison is false, is outside.
    inside = low < value <= high if above else low <= value <= high
    if not inside:
        raise _invalid(
            f"sampling.{name}", value, f"above {low:g}, to {high:g}" if above else f"{low:g} to {high:g}"
        )
    return value


def _logit_bias(message: SamplingMessage, vocab_size: int) -> dict[int, float]:
    bias = dict(message.logit_bias)
    if len(bias) > MAX_LOGIT_BIASES:
        raise _invalid("sampling.logit_bias", len(bias), f"at most {MAX_LOGIT_BIASES} tokens")
    for token_id, value in bias.items():
        if token_id >= vocab_size:
            raise _invalid("sampling.logit_bias", token_id, f"token ids 0 to {vocab_size - 1}")
        if not (math.isfinite(value) and -100 <= value <= 100):
            raise _invalid(f"sampling.logit_bias[{token_id}]", value, "-100 to 100")
    return bias


def _stops(message: SamplingMessage) -> tuple[str, ...]:
    stops = tuple(message.stop)
    if len(stops) > MAX_STOPS:
        raise _invalid("sampling.stop", len(stops), f"at most {MAX_STOPS} texts")
    for index, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise _invalid(f"sampling.stop[{index}]", len(stop), f"1 to {MAX_STOP_CHARS} characters")
    return stops


def _stop_token_ids(message: SamplingMessage, vocab_size: int) -> frozenset[int]:
    token_ids = list(message.stop_token_ids)
    if len(token_ids) > MAX_STOP_TOKENS:
        raise _invalid("sampling.stop_token_ids", len(token_ids), f"at most {MAX_STOP_TOKENS} ids")
    check_token_ids(token_ids, field="sampling.stop_token_ids", vocab_size=vocab_size)
    return frozenset(token_ids)


def _completions(message: SamplingMessage) -> int:
    if not message.HasField("n"):
        return 1
    if not 1 <= message.n <= MAX_COMPLETIONS:
        raise _invalid("sampling.n", message.n, f"1 to {MAX_COMPLETIONS}")
    return message.n


def _invalid(field: str, value: object, limit: str) -> InvalidArgument:
    return InvalidArgument(
        "invalid_value", f"{field} is {value}; it must be {limit}.", field=field, value=value, limit=limit
    )


def _unsupported(field: str, message: str) -> InvalidArgument:
    return InvalidArgument("unsupported_parameter", message, field=field)
