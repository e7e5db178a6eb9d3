"""The gRPC door: the public services under the same keys as the HTTP API, streamed through.

Messages pass as bytes. What they mean is checked by the service that answers them; here only who calls, and
whether that key may call this method.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import grpc

from services.common.call_context import call_scope
from services.common.errors import PermissionDenied
from services.common.rpc.call import Call
from services.common.server import ServiceHost
from services.gateway.auth import bearer_token
from services.gateway.config import GatewaySettings
from services.gateway.keys import KeyRing, Principal
from services.gateway.metering import Meter
from services.gateway.revocation import Check, guarded, key_check
from services.gateway.rpc_metering import Tally, is_metered
from services.gateway.rpc_methods import PublicMethod, public_methods
from services.gateway.upstream import Upstream

# Metadata of an answer that is meant for the client.
_OURS = "lorafleet-"


@dataclass(frozen=True, slots=True)
class _Caller:
    """Who makes the present call, and what raises once its key is no longer good."""

    principal: Principal
    check: Check


_caller: ContextVar[_Caller] = ContextVar("lorafleet_caller")


@asynccontextmanager
async def rpc_door(
    settings: GatewaySettings, keys: KeyRing, upstream: Upstream, meter: Meter
) -> AsyncIterator[ServiceHost | None]:
    """Run the gRPC server of a gateway while the body runs; nothing where no address is set for it."""
    if settings.grpc_listen is None:
        yield None
        return
    methods = public_methods()
    names = list(dict.fromkeys(method.service for method in methods))
    own = settings.model_copy(update={"listen": settings.grpc_listen, "port_file": None})
    host = ServiceHost(own, names, caller=_key_layer(keys, methods), checks_callers=True)
    for service, of_service in groupby(methods, key=lambda method: method.service):
        channel = upstream.channel(service)
        handlers = {method.name: _handler(channel, method, meter) for method in of_service}
        host.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    await host.start()
    await host.ready()
    try:
        yield host
    finally:
        await host.stop()


def _key_layer(
    keys: KeyRing, methods: tuple[PublicMethod, ...]
) -> Callable[[Call], AbstractAsyncContextManager[None]]:
    """Return the layer that lets a call in by its key, and makes it the call of the key's tenant."""
    scopes = {method.path: method.scope for method in methods}

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        if not call.is_ours:
            yield
            return
        key = bearer_token(call.values("authorization"))
        principal = await keys.authenticate(key)
        scope = scopes[call.method]
        if scope is not None and scope not in principal.scopes:
            raise PermissionDenied("permission_denied", f"this API key may not be used for {scope.value}")
        call.tenant = principal.tenant
        _caller.set(_Caller(principal, key_check(keys, key)))
        with call_scope(tenant=principal.tenant):
            yield

    return layer


def _handler(
    channel: grpc.aio.Channel, method: PublicMethod, meter: Meter
) -> grpc.RpcMethodHandler[Any, Any]:
    """Return the handler that passes a method's calls on."""
    multicallables: dict[tuple[bool, bool], Any] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    behind = multicallables[method.streams_requests, method.streams_responses](method.path)

    async def answer_once(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with _metered(meter, method, request) as see:
            answer = await behind(request)
            see(answer)
            return answer

    async def answer_stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        async with _metered(meter, method, request) as see:
            call = behind(request)
            try:
                await context.send_initial_metadata(_for_client(await call.initial_metadata()))
                async for message in guarded(aiter(call), _caller.get().check):
                    see(message)
                    yield message
            finally:
                # Of no effect where it has ended; where the client is gone, the work must end too.
                call.cancel()

    make: dict[tuple[bool, bool], Any] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    handler: grpc.RpcMethodHandler[Any, Any] = make[method.streams_requests, method.streams_responses](
        answer_stream if method.streams_responses else answer_once
    )
    return handler


@asynccontextmanager
async def _metered(
    meter: Meter, method: PublicMethod, request: Any
) -> AsyncIterator[Callable[[bytes], None]]:
    """Charge for a call, and yield what each message of its answer is shown to."""
    if not is_metered(method.path):
        yield lambda _: None
        return
    tally = Tally(method.path, request)
    charge = await meter.charge(_caller.get().principal, tally.about)
    try:
        yield tally.see
    finally:
        charge.settle(tally.counts, tally.adapter)


def _for_client(metadata: Any) -> list[tuple[str, str | bytes]]:
    return [(key, value) for key, value in metadata or () if key.startswith(_OURS)]
