"""An inference service that computes nothing: it keeps a pace, a number of places and a queue, and sheds.

    python -m tests.support.paced_inference --port-file FILE --step-seconds 0.05 --places 200 --queue 50

Its steps are an engine's: each gives every running request one token, all at the same moment, and requests
that wait take places as they become free. Beyond its queue it refuses as ours does. So what stands before it
can be measured without a model's work on the same processor.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from lorafleet.inference.v1 import generation_pb2 as gen
from lorafleet.inference.v1 import inference_service_pb2 as inf
from lorafleet.inference.v1.inference_service_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)
from services.common.config import ServiceSettings
from services.common.errors import ResourceExhausted
from services.common.ids import new_id
from services.common.server import ServiceHost

BASE = "paced"
FINGERPRINT = "sha256:" + "b" * 64
TOKEN = gen.Delta(text=" token", token_ids=[7])
PROMPT_TOKENS = 5
SERVICE = "lorafleet.inference.v1.InferenceService"

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True, eq=False)
class Place:
    """A request that waits or runs: the steps it still has to get, and those that it has not yet seen."""

    missing: int
    steps: asyncio.Queue[None] = field(default_factory=asyncio.Queue)


class PacedInference(InferenceServiceServicer):
    """Gives tokens at its pace; `step_seconds` 0 gives them at once."""

    def __init__(self, step_seconds: float, places: int, queue: int) -> None:
        self._step_seconds = step_seconds
        self._places = places
        self._queue = queue
        self._running: list[Place] = []
        self._waiting: deque[Place] = deque()

    async def Generate(
        self, request: gen.GenerateRequest, context: Context
    ) -> AsyncIterator[gen.GenerateResponse]:
        tokens = request.sampling.max_tokens
        place = self._take_place(tokens)
        try:
            for number in range(tokens):
                if self._step_seconds:
                    await place.steps.get()
                if number == 0:
                    yield gen.GenerateResponse(
                        started=gen.Started(
                            request_id=new_id("gen"),
                            prompt_tokens=PROMPT_TOKENS,
                            base_fingerprint_digest=FINGERPRINT,
                        )
                    )
                yield gen.GenerateResponse(delta=TOKEN)
            usage = gen.Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=tokens)
            end = gen.Finished(reason=gen.FinishReason.FINISH_REASON_LENGTH, usage=usage)
            yield gen.GenerateResponse(finished=end)
        finally:
            self._give_back(place)

    async def GetStatus(self, request: inf.GetStatusRequest, context: Context) -> inf.EngineStatus:
        return inf.EngineStatus(base_model=BASE, base_fingerprint_digest=FINGERPRINT)

    async def run(self) -> None:
        """Make the steps, until cancelled; one that comes late moves those after it."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while self._step_seconds:
            due = max(due + self._step_seconds, loop.time())
            await asyncio.sleep(due - loop.time())
            while self._waiting and len(self._running) < self._places:
                self._running.append(self._waiting.popleft())
            for place in list(self._running):
                place.missing -= 1
                place.steps.put_nowait(None)
                if not place.missing:
                    self._running.remove(place)

    def _take_place(self, tokens: int) -> Place:
        held = len(self._running) + len(self._waiting)
        if self._step_seconds and held >= self._places + self._queue:
            raise ResourceExhausted(
                "queue_full",
                f"{held} requests are being served or wait already.",
                limit=self._places + self._queue,
                retry_after_seconds=1.0,
            )
        place = Place(tokens)
        self._waiting.append(place)
        return place

    def _give_back(self, place: Place) -> None:
        """Free the place of a request that ended; one whose caller left still has it."""
        for kept in (self._running, self._waiting):
            if place in kept:
                kept.remove(place)


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM; the address is in the port file as soon as it listens."""
    # The stubs call every method abstract; one that is left out answers UNIMPLEMENTED.
    inference = PacedInference(options.step_seconds, options.places, options.queue)  # type: ignore[abstract]
    host = ServiceHost(ServiceSettings(listen="127.0.0.1:0"), [SERVICE])
    add_InferenceServiceServicer_to_server(inference, host.server)
    address = await host.start()
    await host.ready()
    stepping = asyncio.create_task(inference.run())
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    partial = options.port_file.with_suffix(".partial")
    await asyncio.to_thread(partial.write_text, f"{address}\n")
    await asyncio.to_thread(partial.replace, options.port_file)
    await stopping.wait()
    stepping.cancel()
    await host.stop(grace_seconds=0)


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--step-seconds", type=float, default=0.0, help="0: no pace, no limit")
    parser.add_argument("--places", type=int, default=256)
    parser.add_argument("--queue", type=int, default=256)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
