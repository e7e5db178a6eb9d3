"""The body of `POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from services.gateway.json_body import field_error
from services.gateway.metering import about_tokens
from services.gateway.sampling import MAX_ALTERNATIVES, GenerationFields, MaxTokens, TokenId

DEFAULT_MAX_TOKENS = 16
MAX_CHOICES = 128

Prompt = str | list[int]
_Tokens = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]


class CompletionRequest(GenerationFields):
    """One or several prompts, as text or as token ids.

    `max_tokens` is 16 when absent, as in OpenAI's API. `best_of` is taken only when it equals `n`, which is
    what happens without it.
    """

    unsupported: ClassVar[frozenset[str]] = frozenset({"suffix"})

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]
        | _Tokens
        | Annotated[list[_Tokens], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: MaxTokens | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_counts(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.completions:
            message = "best_of is not supported, unless it equals n"
            raise field_error("best_of", message, reason="unsupported_parameter")
        if len(self.prompts) * self.completions > MAX_CHOICES:
            raise field_error("n", f"the prompts times n are more than {MAX_CHOICES} choices")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        return [tokens] if tokens else [item for item in self.prompt if not isinstance(item, int)]

    @property
    def completion_limit(self) -> int:
        """Most tokens of one completion."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def about_tokens(self) -> int:
        """About how many tokens the request will use."""
        texts = [prompt for prompt in self.prompts if isinstance(prompt, str)]
        return about_tokens(
            text_bytes=sum(len(text.encode()) for text in texts),
            tokens=sum(len(prompt) for prompt in self.prompts if not isinstance(prompt, str)),
            completions=len(self.prompts) * self.completions,
            limit=self.completion_limit,
        )
