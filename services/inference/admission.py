"""A request's way in: check, encode, resolve; only then is it one for the engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from lorafleet.inference.v1.generation_pb2 import GenerateRequest, ModelRef
from lorafleet.inference.v1.inference_service_pb2 import EmbedRequest, ScoreRequest
from services.common import call_context
from services.common.errors import InvalidArgument
from services.common.ids import new_id
from services.common.prompts import PromptEncoder
from services.inference import validation
from services.inference.chat import Conversation
from services.inference.constraints.compiler import ConstraintCompiler
from services.inference.engine.constraint import Constraint
from services.inference.engine.request import Request, RequestLimits, SamplingParams
from services.inference.resolver import AdapterResolver
from services.inference.sources import AdapterSource

MAX_SCORED_COMPLETIONS = 64
MAX_EMBEDDED_INPUTS = 256


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request for the engine and the version that will answer it; None means the base."""

    request: Request
    source: AdapterSource | None


@dataclass(frozen=True, slots=True)
class AdmittedEmbedding:
    """One request for the engine per input."""

    requests: list[Request]
    source: AdapterSource | None


@dataclass(frozen=True, slots=True)
class AdmittedScore:
    """One request for the engine per completion, each the prompt followed by that completion."""

    requests: list[Request]
    prompt_tokens: int
    source: AdapterSource | None


class Admission:
    """Turns calls into requests for the engine, or refuses them."""

    def __init__(
        self,
        encoder: PromptEncoder,
        resolver: AdapterResolver,
        constraints: ConstraintCompiler,
        limits: RequestLimits,
    ) -> None:
        self._encoder = encoder
        self._resolver = resolver
        self._constraints = constraints
        self._limits = limits

    async def generate(self, message: GenerateRequest) -> Admitted:
        """Admit a generation.

        Raises:
            LorafleetError: as `InferenceService.Generate` says.
        """
        priority = validation.priority(message)
        params = validation.sampling_params(message.sampling, vocab_size=self._limits.vocab_size)
        wanted = validation.constraint(message.sampling)
        prompt = await self.encode_prompt(message)
        validation.check_room(params, len(prompt), max_model_len=self._limits.max_model_len)
        source = await self.resolve(message.model)
        constraint = None if wanted is None else await self._constraints.compile(*wanted)
        return Admitted(self._request(prompt, params, source, priority, constraint), source)

    async def score(self, message: ScoreRequest) -> AdmittedScore:
        """Admit the completions to score; their tokens follow the prompt's, encoded by themselves.

        Raises:
            LorafleetError: as `InferenceService.Score` says.
        """
        _check_texts(list(message.completions), "completions", MAX_SCORED_COMPLETIONS)
        for index, completion in enumerate(message.completions):
            self._check_size(completion, f"completions[{index}]")
        prompt = await self.encode_prompt(message)
        params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=1)
        completions = await asyncio.to_thread(self._encoder.encode_completions, list(message.completions))
        texts = [prompt + completion for completion in completions]
        if not prompt:
            raise InvalidArgument(
                "invalid_value", "The prompt has no tokens.", field="prompt", limit="at least 1"
            )
        for token_ids in texts:
            validation.check_room(params, len(token_ids), max_model_len=self._limits.max_model_len)
        source = await self.resolve(message.model)
        requests = [self._request(token_ids, params, source) for token_ids in texts]
        return AdmittedScore(requests, len(prompt), source)

    async def embed(self, message: EmbedRequest) -> AdmittedEmbedding:
        """Admit the inputs to embed.

        Raises:
            LorafleetError: as `InferenceService.Embed` says.
        """
        inputs = list(message.inputs)
        _check_texts(inputs, "inputs", MAX_EMBEDDED_INPUTS)
        for index, text in enumerate(inputs):
            self._check_size(text, f"inputs[{index}]")
        params = SamplingParams(max_tokens=0, temperature=0.0)
        texts = await asyncio.to_thread(self._encoder.encode_texts, inputs)
        for token_ids in texts:
            validation.check_room(params, len(token_ids), max_model_len=self._limits.max_model_len)
        source = await self.resolve(message.model)
        requests = [self._request(token_ids, params, source, embeds=True) for token_ids in texts]
        return AdmittedEmbedding(requests, source)

    async def encode_prompt(self, message: GenerateRequest | ScoreRequest) -> list[int]:
        """Return the ids of a request's prompt; text is encoded on a thread."""
        match message.WhichOneof("prompt"):
            case "text":
                self._check_size(message.text, "prompt")
                return await asyncio.to_thread(self._encoder.encode_text, message.text)
            case "chat":
                self._check_size("".join(item.content for item in message.chat.messages), "prompt")
                return await asyncio.to_thread(Conversation.read(message.chat).encode, self._encoder)
            case "tokens":
                token_ids = list(message.tokens.token_ids)
                validation.check_token_ids(
                    token_ids, field="tokens.token_ids", vocab_size=self._limits.vocab_size
                )
                return token_ids
            case None:
                raise InvalidArgument(
                    "invalid_value", "A prompt is required.", field="prompt", limit="text, tokens or chat"
                )

    async def resolve(self, model: ModelRef) -> AdapterSource | None:
        """Return the version that a model reference names, or None for the base itself."""
        match model.WhichOneof("target"):
            case "adapter":
                return await self._resolver.resolve(model.adapter, field="model.adapter")
            case "base" if model.base:
                return None
            case _:
                raise InvalidArgument(
                    "invalid_value",
                    "A model is required: the base or an adapter.",
                    field="model",
                    limit="base = true, or an adapter reference",
                )

    def _check_size(self, text: str, field: str) -> None:
        validation.check_size(
            text,
            field=field,
            longest_token_bytes=self._encoder.token_bytes.longest,
            max_model_len=self._limits.max_model_len,
        )

    def _request(
        self,
        prompt: list[int],
        params: SamplingParams,
        source: AdapterSource | None,
        priority: int = 0,
        constraint: Constraint | None = None,
        embeds: bool = False,
    ) -> Request:
        remaining_seconds = call_context.remaining_seconds()
        return Request(
            id=new_id("gen"),
            prompt_token_ids=tuple(prompt),
            sampling=params,
            adapter_digest=None if source is None else source.digest,
            deadline_seconds=None if remaining_seconds is None else time.monotonic() + remaining_seconds,
            tenant=call_context.current_tenant(),
            priority=priority,
            constraint=constraint,
            embeds=embeds,
        )


def _check_texts(texts: list[str], field: str, most: int) -> None:
    if not 1 <= len(texts) <= most:
        raise InvalidArgument(
            "invalid_value",
            f"{field} must hold 1 to {most} texts, not {len(texts)}.",
            field=field,
            value=len(texts),
            limit=f"1 to {most}",
        )
    for index, text in enumerate(texts):
        if not text:
            where = f"{field}[{index}]"
            raise InvalidArgument(
                "invalid_value", f"{where} is empty.", field=where, value=text, limit="at least 1 character"
            )
