"""The bodies of LoRAX's routes."""

from __future__ import annotations

import json
from functools import cached_property
from secrets import randbits
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from lorafleet.inference.v1.generation_pb2 import SamplingParams
from services.gateway.json_body import Body, field_error
from services.gateway.metering import about_tokens
from services.gateway.sampling import MAX_ALTERNATIVES, MAX_COMPLETIONS, MAX_STOPS, MaxTokens, StopText

_SEED_BITS = 63
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class LoraxFormat(Body):
    """What the answer must be; without `schema` a JSON format is any object."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    @property
    def json_schema_text(self) -> str | None:
        """The schema that the answer is constrained to; None where it is free."""
        if self.type == "text":
            return None
        return json.dumps(_ANY_OBJECT if self.schema_ is None else self.schema_)


class Parameters(Body):
    """How to generate.

    As in LoRAX an answer is greedy unless `do_sample` or a field that only sampling gives a meaning asks for
    sampling; a `temperature` of 0 is greedy in any case. An `adapter_id` is a model name as the routes under
    `/v1` take it, and none is the base.
    """

    unsupported: ClassVar[frozenset[str]] = frozenset(
        {"adapter_source", "api_token", "merged_adapters", "truncate", "typical_p"}
    )

    adapter_id: str | None = None
    do_sample: bool | None = None
    max_new_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**_SEED_BITS - 1)] | None = None
    stop: Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos_token: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: Annotated[int, Field(ge=1, le=MAX_ALTERNATIVES)] | None = None
    response_format: LoraxFormat | None = None
    watermark: bool | None = None
    apply_chat_template: bool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Parameters:
        for field in ("watermark", "apply_chat_template"):
            if getattr(self, field):
                raise field_error(field, f"{field} is not supported here", reason="unsupported_parameter")
        if self.completions > 1 and not self.is_sampled:
            raise field_error("best_of", "best_of > 1 needs sampling")
        if self.completions > 1 and self.seed is not None:
            raise field_error("seed", "seed must not be set when best_of is > 1")
        return self

    @property
    def is_sampled(self) -> bool:
        """Whether tokens are drawn; else the likeliest is taken."""
        is_warped = self.temperature not in (None, 1) or self.top_k or self.top_p not in (None, 1)
        return bool(self.do_sample or is_warped) and self.temperature != 0

    @property
    def completions(self) -> int:
        """How many answers are made, of which the likeliest is given."""
        return self.best_of or 1

    @cached_property
    def drawn_seed(self) -> int | None:
        """The seed of a sampled answer: the one that was given, else one drawn for this request."""
        if not self.is_sampled:
            return None
        return randbits(_SEED_BITS) if self.seed is None else self.seed

    def sampling(self, *, logprobs: bool) -> SamplingParams:
        """Return the parameters for inference."""
        format_schema = self.response_format and self.response_format.json_schema_text
        given: dict[str, Any] = {
            "max_tokens": self.max_new_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "seed": self.drawn_seed,
            "n": self.best_of,
            "ignore_eos": self.ignore_eos_token,
            "logprobs": (self.return_k_alternatives or 0) if logprobs else None,
            "prompt_logprobs": 0 if self.decoder_input_details else None,
            "json_schema": format_schema,
        }
        temperature = (1.0 if self.temperature is None else self.temperature) if self.is_sampled else 0.0
        return SamplingParams(
            temperature=temperature,
            stop=self.stop or [],
            **{name: value for name, value in given.items() if value is not None},
        )


class GenerateBody(Body):
    """A text to go on with."""

    inputs: Annotated[str, StringConstraints(min_length=1)]
    parameters: Parameters | None = None

    @property
    def options(self) -> Parameters:
        """The parameters; the defaults where none are given."""
        return self._defaults if self.parameters is None else self.parameters

    @cached_property
    def _defaults(self) -> Parameters:
        return Parameters()

    @property
    def about_tokens(self) -> int:
        """About how many tokens the request will use."""
        return about_tokens(
            text_bytes=len(self.inputs.encode()),
            completions=self.options.completions,
            limit=self.options.max_new_tokens,
        )


class StreamBody(GenerateBody):
    """A text to go on with, token by token."""

    @model_validator(mode="after")
    def _check_streamed(self) -> StreamBody:
        _check_streamed(self.options)
        return self


class CompatBody(GenerateBody):
    """What LoRAX's client posts to `/`."""

    stream: bool = False

    @model_validator(mode="after")
    def _check_compat(self) -> CompatBody:
        if self.stream:
            _check_streamed(self.options)
        return self


class TokenizeBody(Body):
    """A text to take apart. Which special tokens are added is the tokenizer's own rule."""

    inputs: str
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_special_tokens(self) -> TokenizeBody:
        if self.add_special_tokens is False:
            message = "add_special_tokens can only be true"
            raise field_error("add_special_tokens", message, reason="unsupported_parameter")
        return self


def _check_streamed(options: Parameters) -> None:
    if options.completions > 1:
        raise field_error("parameters.best_of", "best_of > 1 cannot be streamed")
    if options.decoder_input_details:
        raise field_error("parameters.decoder_input_details", "decoder_input_details cannot be streamed")
