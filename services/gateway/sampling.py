"""The fields that completions and chat share, and the sampling parameters they become."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from lorafleet.inference.v1.generation_pb2 import SamplingParams
from services.gateway.json_body import Body, field_error

MAX_COMPLETIONS = 16
MAX_ALTERNATIVES = 20
MAX_STOPS = 4
_INT32_MAX = 2**31 - 1
_UINT32_MAX = 2**32 - 1
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=_UINT32_MAX)]
MaxTokens = Annotated[int, Field(ge=1, le=_INT32_MAX)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]


class StreamOptions(Body):
    """`stream_options` of both requests."""

    unsupported: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: bool | None = None


class GenerationFields(Body):
    """What `/v1/completions` and `/v1/chat/completions` take alike.

    `user`, `safety_identifier`, `prompt_cache_key`, `metadata`, `store` and `service_tier` are taken because
    stock clients send them; they describe the caller, and do not change the output in OpenAI's API either.
    """

    model: str | None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None

    # Ours, by the names that other servers of this API use.
    top_k: Annotated[int, Field(ge=0, le=_INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=16)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT32_MAX)] | None = None
    ignore_eos: bool | None = None

    user: Annotated[str, StringConstraints(max_length=1024)] | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=1024)] | None = None
    prompt_cache_key: Annotated[str, StringConstraints(max_length=1024)] | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _check_token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not _TOKEN_ID.fullmatch(key) or int(key) > _UINT32_MAX:
                raise ValueError("keys must be token ids in decimal")
        return value

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "stream_options is only allowed with stream")
        return self

    @property
    def completions(self) -> int:
        """How many completions each prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def wants_usage_in_stream(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def sampling_params(
    fields: GenerationFields,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    json_schema: str | None = None,
) -> SamplingParams:
    """Return the parameters for inference; what was left out stays out, so that inference's defaults hold."""
    given: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": fields.top_k,
        "min_p": fields.min_p,
        "repetition_penalty": fields.repetition_penalty,
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "seed": fields.seed,
        "n": fields.n,
        "min_tokens": fields.min_tokens,
        "ignore_eos": fields.ignore_eos,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "json_schema": json_schema,
    }
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop
    return SamplingParams(
        logit_bias={int(key): bias for key, bias in (fields.logit_bias or {}).items()},
        stop=stop or [],
        stop_token_ids=fields.stop_token_ids or [],
        **{name: value for name, value in given.items() if value is not None},
    )
