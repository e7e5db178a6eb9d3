"""The inference replicas as one channel, for stubs and for the gRPC door alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from lorafleet.inference.v1 import generation_pb2, inference_service_pb2
from services.gateway.routing.hints import DigestHints
from services.gateway.routing.replica import Replica
from services.gateway.routing.router import Router

_SERVICE = "/lorafleet.inference.v1.InferenceService"
# Requests that name a model, which decides where they go.
_WITH_MODEL: dict[str, Any] = {
    f"{_SERVICE}/Generate": generation_pb2.GenerateRequest,
    f"{_SERVICE}/Score": inference_service_pb2.ScoreRequest,
    f"{_SERVICE}/Embed": inference_service_pb2.EmbedRequest,
}
_PREFETCH = f"{_SERVICE}/Prefetch"
# About the memory of each replica: all of them are asked, and their answers are one.
_OF_ALL: dict[str, Any] = {
    f"{_SERVICE}/Evict": inference_service_pb2.EvictResponse,
    f"{_SERVICE}/Pin": inference_service_pb2.ResidentAdapter,
    f"{_SERVICE}/Unpin": inference_service_pb2.ResidentAdapter,
    f"{_SERVICE}/ListResident": inference_service_pb2.ListResidentResponse,
}


class RoutedChannel:
    """Makes calls as `grpc.aio.Channel` does, each on a replica of its own.

    Only what the contract of inference has: no method streams its requests.
    """

    def __init__(self, router: Router, hints: DigestHints) -> None:
        self._router = router
        self._hints = hints

    def unary_unary(self, path: str, *codecs: Any, **options: Any) -> Callable[..., Any]:
        """Return what makes calls with one answer."""

        async def call(request: Any, *, timeout: float | None = None) -> Any:
            if path in _OF_ALL:
                return await self._ask_all(path, codecs, options, request, timeout)
            deadline = None if timeout is None else time.monotonic() + timeout

            async def attempt(replica: Replica) -> Any:
                behind = replica.channel.unary_unary(path, *codecs, **options)
                self._router.fleet.begin(replica)
                try:
                    return await behind(request, timeout=_remaining_seconds(deadline))
                finally:
                    self._router.fleet.end(replica)

            return await self._router.send(await self._adapter(path, request), attempt)

        return call

    def unary_stream(self, path: str, *codecs: Any, **options: Any) -> Callable[..., RoutedStream]:
        """Return what makes calls with a stream of answers."""

        def call(request: Any, *, timeout: float | None = None) -> RoutedStream:
            def start(replica: Replica, timeout_seconds: float | None) -> Any:
                return replica.channel.unary_stream(path, *codecs, **options)(
                    request, timeout=timeout_seconds
                )

            return RoutedStream(self._router, lambda: self._adapter(path, request), start, timeout)

        return call

    def stream_unary(self, path: str, *codecs: Any, **options: Any) -> Callable[..., Any]:
        """Raise `NotImplementedError`: a stream of requests cannot be sent a second time."""
        raise NotImplementedError(path)

    def stream_stream(self, path: str, *codecs: Any, **options: Any) -> Callable[..., Any]:
        """Raise `NotImplementedError`: a stream of requests cannot be sent a second time."""
        raise NotImplementedError(path)

    async def _adapter(self, path: str, request: Any) -> str:
        """Return the digest that a request is about; nobody is asked where there is no choice."""
        if len(self._router.fleet.members) < 2:
            return ""
        ref = _adapter_ref(path, request)
        return await self._hints.digest(ref) if ref else ""

    async def _ask_all(
        self, path: str, codecs: Any, options: Any, request: Any, timeout: float | None
    ) -> Any:
        """Ask every replica; what one has not does not matter where another has it.

        Raises:
            grpc.aio.AioRpcError: the first error but NOT_FOUND; that too where all say so.
        """
        calls = [
            replica.channel.unary_unary(path, *codecs, **options)(request, timeout=timeout)
            for replica in self._router.fleet.replicas
        ]
        answers = await asyncio.gather(*map(_outcome, calls))
        good = [answer for answer in answers if not isinstance(answer, grpc.aio.AioRpcError)]
        errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        for error in errors:
            if error.code() is not grpc.StatusCode.NOT_FOUND or not good:
                raise error
        if not path.endswith("/ListResident"):
            return good[0]
        if isinstance(good[0], bytes):
            # Messages one after the other are one message with the items of all.
            return b"".join(good)
        merged = _OF_ALL[path]()
        for answer in good:
            merged.MergeFrom(answer)
        return merged


class RoutedStream:
    """One streaming call. Until its first message it may move to another replica; after that never."""

    def __init__(
        self,
        router: Router,
        adapter: Callable[[], Any],
        start: Callable[[Replica, float | None], Any],
        timeout_seconds: float | None,
    ) -> None:
        self._router = router
        self._adapter = adapter
        self._start = start
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._call: Any = None
        self._replica: Replica | None = None
        self._beginning = asyncio.create_task(self._begin())
        self._beginning.add_done_callback(_retrieve)

    async def initial_metadata(self) -> Any:
        """Return the metadata of the replica that answers, once it does."""
        await asyncio.shield(self._beginning)
        return await self._call.initial_metadata()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Yield the answers; raise `grpc.RpcError` where the call fails."""
        first, rest = await asyncio.shield(self._beginning)
        if first is grpc.aio.EOF:
            return
        yield first
        try:
            async for message in rest:
                yield message
        except grpc.aio.AioRpcError as error:
            assert self._replica is not None, "it has begun"
            self._router.note_failure(self._replica, error)
            raise

    def cancel(self) -> None:
        """End the call; nothing happens where it has ended."""
        self._beginning.cancel()
        if self._call is not None:
            self._call.cancel()

    async def _begin(self) -> tuple[Any, Any]:
        return await self._router.send(await self._adapter(), self._attempt)

    async def _attempt(self, replica: Replica) -> tuple[Any, Any]:
        fleet = self._router.fleet
        fleet.begin(replica)
        try:
            self._call = self._start(replica, _remaining_seconds(self._deadline))
        except BaseException:
            fleet.end(replica)
            raise
        self._replica = replica
        self._call.add_done_callback(lambda _: fleet.end(replica))
        messages = aiter(self._call)
        return await anext(messages, grpc.aio.EOF), messages


def _adapter_ref(path: str, request: Any) -> str:
    """Return the adapter reference of a request or its bytes; the service refuses bytes that are none."""
    message_class = _WITH_MODEL.get(path)
    if path == _PREFETCH:
        message_class = inference_service_pb2.PrefetchRequest
    if message_class is None:
        return ""
    if isinstance(request, bytes):
        try:
            request = message_class.FromString(request)
        except DecodeError:
            return ""
    return str(request.adapter if path == _PREFETCH else request.model.adapter)


def _remaining_seconds(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())


async def _outcome(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        return error


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Take a result that nobody may come for."""
    if not task.cancelled():
        task.exception()
