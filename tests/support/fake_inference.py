"""An inference service that answers by a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from lorafleet.inference.v1 import generation_pb2 as gen
from lorafleet.inference.v1 import inference_service_pb2 as inf
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceServicer
from lorafleet.registry.v1 import adapter_pb2 as reg
from services.common.call_context import current_tenant
from services.common.errors import (
    LorafleetError,
)
from services.common.ids import new_id
from tests.support.fake_adapters import FakeAdapters
from tests.support.fake_base import BASE, FINGERPRINT, Context, now


@dataclass
class Script:
    """How a generation goes: an error at once, or texts, then an error, a halt or an end.

    An end token is a token without text. `stop` is the stop string that ended it; `logprobs` has one for each
    completion, which all of its tokens have.
    """

    refuse: LorafleetError | None = None
    texts: list[str] = field(default_factory=lambda: ["Hello", " world"])
    fail: LorafleetError | None = None
    hang: bool = False
    hang_before_start: bool = False
    pause_seconds: float = 0.0
    reason: gen.FinishReason.ValueType = gen.FinishReason.FINISH_REASON_STOP
    end_token: bytes | None = None
    stop: str = ""
    logprobs: tuple[float, ...] = (-0.5,) * 16


class FakeInference(InferenceServiceServicer):
    """Answers by the script of the prompt's text (or of the last message), else by the default one."""

    def __init__(self, adapters: FakeAdapters) -> None:
        self._adapters = adapters
        self.scripts: dict[str, Script] = {}
        self.requests: list[gen.GenerateRequest] = []
        self.metadata: dict[str, str] = {}
        self.started = 0
        self.cancelled = 0
        self.ended = 0
        self.resident: list[inf.ResidentAdapter] = []
        self.fingerprint = FINGERPRINT

    async def Generate(
        self, request: gen.GenerateRequest, context: Context
    ) -> AsyncIterator[gen.GenerateResponse]:
        self.requests.append(request)
        self.metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        try:
            async for response in self._generate(request):
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.ended += 1

    async def _generate(self, request: gen.GenerateRequest) -> AsyncIterator[gen.GenerateResponse]:
        text = self._text(request)
        script = self.scripts.get(text, Script())
        if script.refuse is not None:
            raise script.refuse
        version = reg.AdapterVersion()
        if request.model.WhichOneof("target") == "adapter":
            version = self._adapters.resolve(request.model.adapter, current_tenant())
        self.started += 1
        if script.hang_before_start:
            await asyncio.sleep(3600)
        prompt = self._tokens(text)
        started = gen.Started(
            request_id=new_id("gen"),
            version_digest=version.digest,
            version_ref=f"{version.adapter}:{version.version}" if version.adapter else "",
            prompt_tokens=len(prompt),
            base_fingerprint_digest=FINGERPRINT,
        )
        if request.sampling.HasField("prompt_logprobs"):
            started.prompt_logprobs.extend(
                self._position(token, request.sampling.prompt_logprobs) for token in prompt[1:]
            )
        yield gen.GenerateResponse(started=started)
        completions = request.sampling.n or 1
        tokens = [(text, text.encode()) for text in script.texts]
        if script.end_token is not None:
            tokens.append(("", script.end_token))
        for piece, token in tokens:
            for index in range(completions):
                delta = gen.Delta(index=index, text=piece)
                if request.sampling.HasField("logprobs"):
                    alternatives, logprob = request.sampling.logprobs, script.logprobs[index]
                    delta.logprobs.append(self._position(token, alternatives, logprob))
                yield gen.GenerateResponse(delta=delta)
                await asyncio.sleep(script.pause_seconds)
        if script.fail is not None:
            raise script.fail
        if script.hang:
            await asyncio.sleep(3600)
        for index in range(completions):
            usage = gen.Usage(prompt_tokens=len(prompt), completion_tokens=len(tokens))
            finished = gen.Finished(index=index, reason=script.reason, stop=script.stop, usage=usage)
            yield gen.GenerateResponse(finished=finished)

    async def Tokenize(self, request: inf.TokenizeRequest, context: Context) -> inf.TokenizeResponse:
        tokens = self._tokens(request.text)
        return inf.TokenizeResponse(token_ids=[token[0] for token in tokens], tokens=tokens)

    async def Detokenize(self, request: inf.DetokenizeRequest, context: Context) -> inf.DetokenizeResponse:
        return inf.DetokenizeResponse(text=bytes(request.token_ids).decode())

    async def Embed(self, request: inf.EmbedRequest, context: Context) -> inf.EmbedResponse:
        if request.model.WhichOneof("target") == "adapter":
            self._adapters.resolve(request.model.adapter, current_tenant())
        tokens = sum(len(text) for text in request.inputs)
        vectors = [inf.Embedding(values=[float(len(text)), 0.5]) for text in request.inputs]
        return inf.EmbedResponse(embeddings=vectors, usage=gen.Usage(prompt_tokens=tokens))

    async def ListResident(
        self, request: inf.ListResidentRequest, context: Context
    ) -> inf.ListResidentResponse:
        return inf.ListResidentResponse(adapters=self.resident)

    async def GetStatus(self, request: inf.GetStatusRequest, context: Context) -> inf.EngineStatus:
        return inf.EngineStatus(
            base_model=BASE,
            base_fingerprint_digest=self.fingerprint,
            start_time=now(),
            device="cpu",
            max_model_len=1024,
        )

    @staticmethod
    def _text(request: gen.GenerateRequest) -> str:
        kind = request.WhichOneof("prompt")
        if kind == "text":
            return request.text
        if kind == "tokens":
            return bytes(request.tokens.token_ids).decode()
        return request.chat.messages[-1].content

    @staticmethod
    def _tokens(text: str) -> list[bytes]:
        """One token per byte."""
        return [bytes([byte]) for byte in text.encode()]

    @staticmethod
    def _position(token: bytes, alternatives: int, logprob: float = -0.5) -> gen.PositionLogprobs:
        chosen = gen.TokenLogprob(token_id=token[0] if token else 0, text=token, logprob=logprob)
        others = [
            gen.TokenLogprob(token_id=number, text=b"alt%d" % number, logprob=-1.0 - number)
            for number in range(1, alternatives)
        ]
        return gen.PositionLogprobs(chosen=chosen, alternatives=[chosen, *others][:alternatives])
