"""Counts calls: started, active, handled by status code. Knows nothing of what they do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from pagestream.server.metrics import Metrics

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # not subscriptable at run time
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class CallCounter(grpc.aio.ServerInterceptor):
    """Counts the methods of our own services; unknown ones are left out, so that clients cannot invent label values."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/pagestream."):
            return handler
        codec = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._count_stream(handler.unary_stream, method), *codec)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._count_unary(handler.unary_unary, method), *codec)
        return handler

    def _count_unary(self, inner: Callable[..., Any], method: str) -> Callable[..., Any]:
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
        return code.name if isinstance(code, grpc.StatusCode) else _NAMES[code]
    return "CANCELLED" if context.cancelled() else "OK"
