"""The one server interceptor: puts layers around the methods of all four kinds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import grpc

from services.common.rpc.call import Call, Layer
from services.common.rpc.messages import DecodedStream, decoded
from services.common.rpc.remainder import read_to_the_end


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Runs each call inside its layers, the first one outermost.

    The handler is wrapped, not the continuation, which only looks the handler up. A method that answers by
    a stream may be an async generator or a coroutine that calls `context.write`; both become the latter, so
    that layers see every error and every cancellation, and a generator is closed before its call ends.
    Requests are deserialized inside the layers too; a method that takes a stream iterates over it and does
    not call `context.read`, which would give it bytes.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = tuple(layers)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return self._wrapped(handler, handler_call_details.method)

    def _wrapped(
        self, handler: grpc.RpcMethodHandler[Any, Any], method: str
    ) -> grpc.RpcMethodHandler[Any, Any]:
        is_streaming = bool(handler.request_streaming or handler.response_streaming)
        behavior: Any = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )

        take: Any = DecodedStream if handler.request_streaming else decoded

        async def answer_once(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with self._around(Call(method, is_streaming, context)):
                taken = take(request, handler.request_deserializer, method)
                if not handler.request_streaming:
                    return await behavior(taken, context)
                async with read_to_the_end(request):
                    return await behavior(taken, context)

        async def answer_stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            async with self._around(Call(method, is_streaming, context)):
                answer = behavior(take(request, handler.request_deserializer, method), context)
                if not hasattr(answer, "__aiter__"):
                    await answer
                    return
                async with aclosing(answer):
                    async for message in answer:
                        await context.write(message)

        make_handler: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[bool(handler.request_streaming), bool(handler.response_streaming)]
        wrapped: grpc.RpcMethodHandler[Any, Any] = make_handler(
            answer_stream if handler.response_streaming else answer_once,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    @asynccontextmanager
    async def _around(self, call: Call) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for layer in self._layers:
                await stack.enter_async_context(layer(call))
            yield
