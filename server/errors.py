"""Every way a request can be refused or fail, with its gRPC status: the error table of the design as code.

Plain Python on purpose: status.py turns these into google.rpc details at the edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

StatusName = Literal[
    "INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "INTERNAL",
    "CANCELLED",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "UNIMPLEMENTED",
]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request has cost."""

    prompt_tokens: int
    output_tokens: int
    preemptions: int


class RequestError(Exception):
    """A request that is refused or that failed. `reason` is what clients switch on (google.rpc.ErrorInfo)."""

    status: ClassVar[StatusName] = "INTERNAL"
    reason: ClassVar[str] = "ENGINE_FAULT"
    usage: Usage | None = None  # of a request that was taken on: what there was of its answer

    @property
    def retry_after_seconds(self) -> float | None:
        """When to try again (google.rpc.RetryInfo); None where trying again cannot help."""
        return None


class InvalidFieldError(RequestError):
    """A field that is missing, out of range or unknown; `field` is its path in the request, such as
    `sampling.top_p`."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_FIELD"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class PromptExceedsModelContextError(RequestError):
    status = "INVALID_ARGUMENT"
    reason = "PROMPT_EXCEEDS_MODEL_CONTEXT"

    def __init__(self, num_tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {num_tokens} tokens; the model's context is {limit} and one is kept for the answer"
        )


class PromptExceedsKvCapacityError(RequestError):
    status = "INVALID_ARGUMENT"
    reason = "PROMPT_EXCEEDS_KV_CAPACITY"

    def __init__(self, num_tokens: int, capacity: int) -> None:
        super().__init__(
            f"the prompt has {num_tokens} tokens; the server's KV pool holds {capacity} and one is kept for the answer "
            f"(--kv-memory sets it)"
        )


class RetryableError(RequestError):
    """A refusal that may pass later."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self._retry_after_seconds = retry_after_seconds

    @property
    def retry_after_seconds(self) -> float:
        return self._retry_after_seconds


class QueueFullError(RetryableError):
    status = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"


class QueueTimeoutError(RetryableError):
    status = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_TIMEOUT"


class SlowReaderError(RequestError):
    status = "RESOURCE_EXHAUSTED"
    reason = "SLOW_READER"


class UnauthenticatedError(RequestError):
    status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class KeyLimitError(RequestError):
    """More than the caller's key allows."""

    status = "PERMISSION_DENIED"
    reason = "KEY_LIMIT"


class KeyBusyError(RetryableError):
    """As many calls at once as the caller's key allows."""

    status = "RESOURCE_EXHAUSTED"
    reason = "KEY_BUSY"


class LoadingError(RetryableError):
    status = "UNAVAILABLE"
    reason = "LOADING"


class DrainingError(RetryableError):
    status = "UNAVAILABLE"
    reason = "DRAINING"


class DeadlineExceededError(RequestError):
    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE"


class UnknownModelError(RequestError):
    status = "NOT_FOUND"
    reason = "UNKNOWN_MODEL"


class NoChatTemplateError(RequestError):
    status = "FAILED_PRECONDITION"
    reason = "NO_CHAT_TEMPLATE"


class DuplicateRequestError(RequestError):
    status = "ALREADY_EXISTS"
    reason = "DUPLICATE_REQUEST_ID"


class GaveWayError(RequestError):
    """A request of the server's own, ended because a client's arrived."""

    status = "CANCELLED"


class UnsupportedError(RequestError):
    """A method of somebody else's contract that has no meaning here."""

    status = "UNIMPLEMENTED"
    reason = "UNSUPPORTED"


class AbortedError(RequestError):
    """Ended by a call of its own, such as a gateway's Abort."""

    status = "CANCELLED"
    reason = "ABORTED"


class EngineFaultError(RequestError):
    """Something of ours broke; the message carries the request id and no internals."""

    status = "INTERNAL"
    reason = "ENGINE_FAULT"
