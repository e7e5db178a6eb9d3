"""The one factory for channels to our services, and what each call takes along.

Calls carry the tenant, the request id and the trace context of the call they are made in, and never wait
longer than the time that call has left.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from services.common import call_context, telemetry
from services.common.rpc.request_id import REQUEST_ID_KEY
from services.common.rpc.tenant import TENANT_KEY
from services.common.tls import PeerTls
from services.common.transport import KEEPALIVE, KeepAlive, channel_options


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When an idempotent call is sent again: only after UNAVAILABLE and never once an answer has begun."""

    max_attempts: int = 4
    """Attempts in all, the first included; gRPC takes at most 5."""

    initial_backoff_seconds: float = 0.1
    max_backoff_seconds: float = 2.0
    backoff_multiplier: float = 2.0

    throttle_max_tokens: int = 20
    """Failures in a row after which retries pause for all calls of the channel: half of this."""

    throttle_token_ratio: float = 0.2
    """What a success gives back of the one token that a failure takes."""


def open_channel(
    target: str,
    *,
    idempotent_methods: Sequence[str] = (),
    retry: RetryPolicy = RetryPolicy(),
    keepalive: KeepAlive = KEEPALIVE,
    unary_timeout_seconds: float = 60.0,
    tls: PeerTls | None = None,
) -> grpc.aio.Channel:
    """Return a channel to `HOST:PORT`; it connects at its first call and again whenever the peer comes back.

    Args:
        target: address of the server.
        idempotent_methods: full names (`package.Service/Method`) of the methods that may be retried.
        retry: how they are retried.
        keepalive: how dead connections are found.
        unary_timeout_seconds: the time for calls with one answer that are made without a `timeout`.
        tls: whom to trust, and who we are; plain text when None.
    """
    options: list[tuple[str, Any]] = [
        *channel_options(keepalive),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.service_config", _service_config(idempotent_methods, retry)),
    ]
    interceptors: list[grpc.aio.ClientInterceptor] = [
        _UnaryUnary(unary_timeout_seconds),
        _UnaryStream(None),
        _StreamUnary(None),
        _StreamStream(None),
    ]
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(target, tls.credentials(), options=options, interceptors=interceptors)


def _service_config(idempotent_methods: Sequence[str], retry: RetryPolicy) -> str:
    config: dict[str, Any] = {}
    if idempotent_methods:
        names = [
            dict(zip(("service", "method"), name.split("/"), strict=True)) for name in idempotent_methods
        ]
        policy = {
            "maxAttempts": retry.max_attempts,
            "initialBackoff": f"{retry.initial_backoff_seconds:g}s",
            "maxBackoff": f"{retry.max_backoff_seconds:g}s",
            "backoffMultiplier": retry.backoff_multiplier,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        config = {
            "methodConfig": [{"name": names, "retryPolicy": policy}],
            "retryThrottling": {
                "maxTokens": retry.throttle_max_tokens,
                "tokenRatio": retry.throttle_token_ratio,
            },
        }
    return json.dumps(config)


class _Outgoing:
    """What the four interceptors share; grpc sorts them by kind, so one class cannot serve all four."""

    def __init__(self, default_timeout_seconds: float | None) -> None:
        self._default_timeout_seconds = default_timeout_seconds
        self._endings: set[asyncio.Task[None]] = set()

    async def _send(self, continuation: Any, details: grpc.aio.ClientCallDetails, request: Any) -> Any:
        """Start the call inside a client span that ends with it, and return the call itself."""
        method: str | bytes = details.method
        name = (method.decode() if isinstance(method, bytes) else method).lstrip("/")
        span = telemetry.tracer().start_span(
            name, kind=SpanKind.CLIENT, attributes=telemetry.rpc_attributes(name)
        )
        with trace.use_span(span, end_on_exit=False):
            try:
                call = await continuation(self._prepared(details), request)
            except BaseException:
                span.end()
                raise
        call.add_done_callback(lambda ended: self._finish(span, ended))
        return call

    def _prepared(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        carried = {
            TENANT_KEY: call_context.tenant_or_none(),
            REQUEST_ID_KEY: call_context.request_id(),
            **dict(telemetry.outgoing_metadata()),
        }
        for key, value in carried.items():
            if value is not None and metadata.get(key) is None:
                metadata.add(key, value)
        timeouts = (
            details.timeout if details.timeout is not None else self._default_timeout_seconds,
            call_context.remaining_seconds(),
        )
        timeout_seconds = min((seconds for seconds in timeouts if seconds is not None), default=None)
        if timeout_seconds is not None and timeout_seconds <= 0:
            # With a time-out of 0 gRPC sends the call, and may even return its answer.
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.aio.Metadata(),
                grpc.aio.Metadata(),
                details="no time is left for this call",
            )
        return grpc.aio.ClientCallDetails(
            method=details.method,
            timeout=timeout_seconds,
            metadata=metadata,
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )

    def _finish(self, span: Span, call: grpc.aio.Call) -> None:
        # The code of a call that has ended is there at once, but can only be had by awaiting it.
        task = asyncio.get_running_loop().create_task(_end_span(span, call))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)


async def _end_span(span: Span, call: grpc.aio.Call) -> None:
    telemetry.record_status(span, await call.code(), server=False)
    span.end()


class _UnaryUnary(_Outgoing, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await self._send(continuation, client_call_details, request)


class _UnaryStream(_Outgoing, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Any, client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await self._send(continuation, client_call_details, request)


class _StreamUnary(_Outgoing, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Any, client_call_details: grpc.aio.ClientCallDetails, request_iterator: Any
    ) -> Any:
        return await self._send(continuation, client_call_details, request_iterator)


class _StreamStream(_Outgoing, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Any, client_call_details: grpc.aio.ClientCallDetails, request_iterator: Any
    ) -> Any:
        return await self._send(continuation, client_call_details, request_iterator)
