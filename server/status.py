"""Errors as gRPC statuses with google.rpc details; the only place that knows both."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from pagestream.server.call import current_call
from pagestream.server.errors import InvalidFieldError, RequestError
from pagestream.v1.generation_pb2 import Usage

_DETAILS_KEY = "grpc-status-details-bin"  # the metadata key that clients' google.rpc libraries read
_DOMAIN = "pagestream"


def to_status(error: RequestError) -> status_pb2.Status:
    """ErrorInfo always; BadRequest for a field; RetryInfo where trying again can help; Usage of what there was of an
    answer.
    """
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN)]
    if isinstance(error, InvalidFieldError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.problem)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_seconds is not None:
        seconds = math.ceil(error.retry_after_seconds)
        details.append(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=seconds)))
    if error.usage is not None:
        usage = error.usage
        details.append(
            Usage(prompt_tokens=usage.prompt_tokens, output_tokens=usage.output_tokens, preemptions=usage.preemptions)
        )
    code = grpc.StatusCode[error.status].value[0]
    status = status_pb2.Status(code=code, message=str(error))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: RequestError) -> NoReturn:
    """Ends the call with the error's status; does not return."""
    current_call().error = error
    metadata = ((_DETAILS_KEY, to_status(error).SerializeToString()),)
    await context.abort(grpc.StatusCode[error.status], str(error), trailing_metadata=metadata)
    raise AssertionError("abort raises")
