"""A small service on a real server: the tests give its methods, messages are plain bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from services.common.channels import open_channel
from services.common.config import ServiceSettings
from services.common.server import ServiceHost

SERVICE = "lorafleet.test.v1.EchoService"
ONCE = f"/{SERVICE}/Once"
STREAM = f"/{SERVICE}/Stream"
COLLECT = f"/{SERVICE}/Collect"
CHAT = f"/{SERVICE}/Chat"
TENANT = (("lorafleet-tenant", "acme"),)


def echo_service(
    *,
    once: Callable[..., Any] | None = None,
    stream: Callable[..., Any] | None = None,
    collect: Callable[..., Any] | None = None,
    chat: Callable[..., Any] | None = None,
) -> grpc.GenericRpcHandler:
    """Return the handlers of a service with a method of each kind that was given."""
    methods: dict[str, Any] = {}
    if once is not None:
        methods["Once"] = grpc.unary_unary_rpc_method_handler(once)
    if stream is not None:
        methods["Stream"] = grpc.unary_stream_rpc_method_handler(stream)
    if collect is not None:
        methods["Collect"] = grpc.stream_unary_rpc_method_handler(collect)
    if chat is not None:
        methods["Chat"] = grpc.stream_stream_rpc_method_handler(chat)
    return grpc.method_handlers_generic_handler(SERVICE, methods)


@asynccontextmanager
async def running_host(
    handlers: grpc.GenericRpcHandler, settings: ServiceSettings | None = None
) -> AsyncIterator[tuple[ServiceHost, str]]:
    """Run a host with the handlers on a free port; yield it and its address."""
    host = ServiceHost(settings or ServiceSettings(), [SERVICE])
    host.server.add_generic_rpc_handlers((handlers,))
    await host.ready()
    address = await host.start()
    try:
        yield host, str(address)
    finally:
        await host.stop(grace_seconds=0)


@asynccontextmanager
async def foreign_channel(address: str, **options: int) -> AsyncIterator[Any]:
    """Yield a channel that is not of our making and adds nothing; `Any`, since its messages are bytes."""
    arguments = [(f"grpc.{name}", value) for name, value in options.items()]
    async with grpc.aio.insecure_channel(address, options=arguments) as channel:
        yield channel


@asynccontextmanager
async def plain_channel(
    handlers: grpc.GenericRpcHandler, settings: ServiceSettings | None = None
) -> AsyncIterator[Any]:
    """Run a host with the handlers; yield a foreign channel to it."""
    async with running_host(handlers, settings) as (_, address), foreign_channel(address) as channel:
        yield channel


@asynccontextmanager
async def our_channel(
    handlers: grpc.GenericRpcHandler, settings: ServiceSettings | None = None, **options: Any
) -> AsyncIterator[Any]:
    """Run a host with the handlers; yield a channel from our own factory."""
    async with running_host(handlers, settings) as (_, address), open_channel(address, **options) as channel:
        yield channel
