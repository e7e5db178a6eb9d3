"""From what the engine says to the messages of the contract."""

from __future__ import annotations

from collections.abc import Iterable

from lorafleet.inference.v1.generation_pb2 import (
    FINISH_REASON_ABORTED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    Delta,
    Finished,
    GenerateResponse,
    PositionLogprobs,
    TokenLogprob,
    Usage,
)
from lorafleet.inference.v1.inference_service_pb2 import CompletionScore
from services.common.token_bytes import TokenBytes
from services.inference.engine import events
from services.inference.engine.events import TokenEvent

_FINISH_REASONS = {
    events.FinishReason.STOP: FINISH_REASON_STOP,
    events.FinishReason.LENGTH: FINISH_REASON_LENGTH,
    events.FinishReason.ABORTED: FINISH_REASON_ABORTED,
}


class Converter:
    """Converts token events; knows the bytes of the base's tokens and which of them end a completion."""

    def __init__(self, token_bytes: TokenBytes, eos_token_ids: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._eos_token_ids = eos_token_ids

    def responses(self, batch: Iterable[TokenEvent]) -> list[GenerateResponse]:
        """Return one Delta per completion that went on, then one Finished per completion that ended."""
        deltas: dict[int, Delta] = {}
        responses = []
        for event in batch:
            delta = deltas.setdefault(event.index, Delta(index=event.index))
            delta.text += event.text
            delta.token_ids.extend(event.token_ids)
            delta.logprobs.extend(self.positions(event.logprobs))
            if event.finish_reason is not None:
                responses.append(GenerateResponse(finished=self._finished(event)))
        said = [GenerateResponse(delta=delta) for delta in deltas.values() if delta.token_ids or delta.text]
        return said + responses

    def positions(self, logprobs: Iterable[events.TokenLogprob]) -> list[PositionLogprobs]:
        """Return tokens with their log-probabilities and alternatives."""
        return [
            PositionLogprobs(
                chosen=self._token(position.token_id, position.logprob),
                alternatives=[self._token(token_id, logprob) for token_id, logprob in position.top],
            )
            for position in logprobs
        ]

    def completion_score(self, event: TokenEvent, prompt_tokens: int) -> CompletionScore:
        """Return the score of a completion: of all tokens that follow the first `prompt_tokens`."""
        assert event.prompt_logprobs is not None, "prompt log-probabilities were asked for"
        logprobs = event.prompt_logprobs[prompt_tokens - 1 :]
        return CompletionScore(
            logprob=sum(position.logprob for position in logprobs),
            tokens=[self._token(position.token_id, position.logprob) for position in logprobs],
            is_greedy=all(position.logprob >= position.top[0][1] for position in logprobs),
        )

    def _token(self, token_id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token_id=token_id, text=self._token_bytes[token_id], logprob=logprob)

    def _finished(self, event: TokenEvent) -> Finished:
        assert event.finish_reason is not None
        return Finished(
            index=event.index,
            reason=_FINISH_REASONS[event.finish_reason],
            stop=self._stop(event.stop_cause),
            usage=Usage(
                prompt_tokens=event.prompt_tokens,
                completion_tokens=event.completion_tokens,
                cached_tokens=event.cached_tokens,
            ),
        )

    def _stop(self, cause: str | int | None) -> str:
        if cause is None or cause in self._eos_token_ids:
            return ""
        return cause if isinstance(cause, str) else self._token_bytes[cause].decode("utf-8", "replace")
