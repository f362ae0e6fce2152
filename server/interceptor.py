"""Counts calls: started, active, handled by status code. Knows nothing of what they do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from pagestream.server.metrics import Metrics

Context = grpc.aio.ServicerContext[Any, Any]


class CallCounter(grpc.aio.ServerInterceptor):
    """Methods that do not exist are not counted, so that clients cannot invent label values."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or handler.request_streaming:
            return handler
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._count_stream(handler.unary_stream, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._count_unary(handler.unary_unary, method),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _count_unary(self, inner: Callable[..., Any] | None, method: str) -> Callable[..., Any]:
        async def call(request: Any, context: Context) -> Any:
            self._metrics.call_started(method)
            try:
                return await inner(request, context)
            finally:
                self._metrics.call_handled(method, _code(context))

        return call

    def _count_stream(self, inner: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            self._metrics.call_started(method)
            try:
                async for response in inner(request, context):
                    yield response
            finally:
                self._metrics.call_handled(method, _code(context))

        return call


def _code(context: Context) -> str:
    """The status as a name: what the handler set, CANCELLED for a client that left, else OK."""
    code = context.code()
    if code:
        return code.name if isinstance(code, grpc.StatusCode) else str(code)
    return "CANCELLED" if context.cancelled() else "OK"
