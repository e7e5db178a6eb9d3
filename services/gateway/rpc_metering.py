"""Reading out of gRPC messages what they are charged for."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import DecodeError

from lorafleet.inference.v1.generation_pb2 import GenerateRequest, GenerateResponse, Usage
from lorafleet.inference.v1.inference_service_pb2 import (
    EmbedRequest,
    EmbedResponse,
    ScoreRequest,
    ScoreResponse,
)
from services.gateway.metering import about_tokens
from services.gateway.usage import Counts

_SERVICE = "/lorafleet.inference.v1.InferenceService"


class Tally:
    """What a call has used so far, from the answers that were passed on."""

    def __init__(self, path: str, request: bytes) -> None:
        """Read the request; bytes that are none are for the service to refuse."""
        self.counts = Counts()
        self.adapter = ""
        self.about = 0
        self._see, read = _METHODS[path]
        try:
            self.about = read(self, request)
        except DecodeError:
            self.about = 0

    def see(self, answer: bytes) -> None:
        """Count one message of the answer."""
        self._see(self, answer)

    def add(self, usage: Usage) -> None:
        """Count what an answer says was used."""
        self.counts.add(Counts(0, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens))


def is_metered(path: str) -> bool:
    """Whether calls of a method are charged for."""
    return path in _METHODS


def _generate(tally: Tally, data: bytes) -> int:
    request = GenerateRequest.FromString(data)
    sampling = request.sampling
    return about_tokens(
        text_bytes=len(request.text.encode()) + sum(len(m.content.encode()) for m in request.chat.messages),
        tokens=len(request.tokens.token_ids),
        completions=sampling.n or 1,
        limit=sampling.max_tokens if sampling.HasField("max_tokens") else None,
    )


def _generated(tally: Tally, data: bytes) -> None:
    answer = GenerateResponse.FromString(data)
    match answer.WhichOneof("event"):
        case "started":
            tally.adapter = answer.started.version_ref.partition(":")[0]
            tally.counts.prompt_tokens += answer.started.prompt_tokens
        case "delta":
            tally.counts.completion_tokens += len(answer.delta.token_ids)
        case "finished":
            # One prompt, however many completions: the first end tells what was cached.
            cached = answer.finished.usage.cached_tokens
            tally.counts.cached_tokens = max(tally.counts.cached_tokens, cached)


def _score(tally: Tally, data: bytes) -> int:
    request = ScoreRequest.FromString(data)
    tally.adapter = _name(request.model.adapter)
    text_bytes = len(request.text.encode()) + sum(len(text.encode()) for text in request.completions)
    return about_tokens(text_bytes=text_bytes, tokens=len(request.tokens.token_ids), limit=0)


def _scored(tally: Tally, data: bytes) -> None:
    tally.add(ScoreResponse.FromString(data).usage)


def _embed(tally: Tally, data: bytes) -> int:
    request = EmbedRequest.FromString(data)
    tally.adapter = _name(request.model.adapter)
    return about_tokens(text_bytes=sum(len(text.encode()) for text in request.inputs), limit=0)


def _embedded(tally: Tally, data: bytes) -> None:
    tally.add(EmbedResponse.FromString(data).usage)


def _name(ref: str) -> str:
    return ref.partition("@")[0].partition(":")[0]


_METHODS: dict[str, tuple[Callable[[Tally, bytes], None], Callable[[Tally, bytes], int]]] = {
    f"{_SERVICE}/Generate": (_generated, _generate),
    f"{_SERVICE}/Score": (_scored, _score),
    f"{_SERVICE}/Embed": (_embedded, _embed),
}
