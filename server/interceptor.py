"""What every call passes: identity, counting, the journal, and an end in a typed status whatever breaks."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from pagestream.server import status
from pagestream.server.call import Call, enter
from pagestream.server.door import Door
from pagestream.server.engine import HANGS_UP_EARLY
from pagestream.server.errors import EngineFaultError, InvalidFieldError, RequestError, UnauthenticatedError
from pagestream.server.metrics import Metrics

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # not subscriptable at run time
Sink = Callable[[Call], None]  # told of every call when it is over
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
_HEALTH = "/grpc.health.v1."  # probes have no token
_COUNTED = "/pagestream."
_OURS = (_COUNTED, "/vllm.grpc.engine.")


class Interceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a key; the methods of our services it reports to the sinks, and counts those of our own
    protos. Unknown methods are left out, so that clients cannot invent label values.
    """

    def __init__(self, metrics: Metrics, door: Door, sinks: Sequence[Sink]) -> None:
        self._metrics = metrics
        self._door = door
        self._sinks = sinks

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_HEALTH):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        call = Call(method, traceparent=str(metadata.get("traceparent", "")))
        try:
            call.key = self._door.identify(metadata)
        except UnauthenticatedError as error:
            return self._refusal(call, error)
        if not method.startswith(_OURS):
            return handler
        parse = handler.request_deserializer
        if handler.unary_stream is not None:
            behaviour = self._stream(call, handler.unary_stream, parse)
            return grpc.unary_stream_rpc_method_handler(behaviour, None, handler.response_serializer)
        if handler.unary_unary is None:
            return handler
        behaviour = self._unary(call, handler.unary_unary, parse)
        return grpc.unary_unary_rpc_method_handler(behaviour, None, handler.response_serializer)

    def _refusal(self, call: Call, error: UnauthenticatedError) -> Handler:
        """Of any kind of method; one that takes a stream is called before anything is read of what was sent."""

        async def refuse(_requests: Any, context: Context) -> None:
            async with self._around(call, context):
                raise error

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _unary(self, call: Call, inner: Callable[..., Any], parse: Any) -> Callable[..., Any]:
        async def run(data: bytes, context: Context) -> Any:
            async with self._around(call, context):
                return await inner(_parse(data, parse), context)

        return run

    def _stream(self, call: Call, inner: Callable[..., Any], parse: Any) -> Callable[..., Any]:
        async def run(data: bytes, context: Context) -> AsyncIterator[Any]:
            async with self._around(call, context):
                async for response in inner(_parse(data, parse), context):
                    yield response

        return run

    @asynccontextmanager
    async def _around(self, call: Call, context: Context) -> AsyncIterator[None]:
        enter(call)
        is_counted = call.method.startswith(_COUNTED)
        if is_counted:
            self._metrics.call_started(call.method)
        # Not below, in `finally`: gRPC drops a generator whose client has gone, and its end comes when it is collected.
        context.add_done_callback(lambda _context: self._over(call, context))  # type: ignore[arg-type]
        try:
            self._door.enter(call.key)
            context.add_done_callback(lambda _context: self._door.leave(call.key))  # type: ignore[arg-type]
            yield
            call.is_complete = True
        except RequestError as error:  # before the service, which counts and ends its own
            self._metrics.observe_rejected(error.reason, time.monotonic() - call.received)
            await status.abort(context, error)
        except (grpc.aio.AbortError, grpc.aio.UsageError, grpc.aio.InternalError):
            raise  # gRPC's own ways to end a call
        except Exception as error:  # noqa: BLE001 - whatever it is, the client must hear of it in a typed status
            # Not the error's own words, which may quote a prompt.
            trace = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s failed: %s\n%s", call.method, type(error).__name__, trace)  # noqa: TRY400 - see above
            await status.abort(context, EngineFaultError("the call failed inside the server"))
        finally:
            if is_counted:
                self._metrics.call_handled(call.method, _code(call, context))

    def _over(self, call: Call, context: Context) -> None:
        call.end(_code(call, context))
        for sink in self._sinks:
            sink(call)


def _parse(data: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(data)
    except DecodeError:
        raise InvalidFieldError("request", "is not a message of the type that this method takes") from None


def _code(call: Call, context: Context) -> str:
    """The status as a name: what the handler set, OK if it came to its end; for a client that left before
    DEADLINE_EXCEEDED at its deadline, else CANCELLED (`context.cancelled()` is false then).
    """
    code = context.code()
    if code:
        return code.name if isinstance(code, grpc.StatusCode) else _NAMES[code]
    if call.is_complete:
        return "OK"
    remaining = context.time_remaining()
    return "CANCELLED" if remaining is None or remaining > HANGS_UP_EARLY else "DEADLINE_EXCEEDED"
