"""One call on its way through the server: who makes it, what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from pagestream.server.errors import RequestError
from pagestream.server.job import Job
from pagestream.server.keys import ANYBODY, Key


@dataclass(slots=True)
class Call:
    """Made by the interceptor for each call, filled in on its road, read by the journal when it is over."""

    method: str = ""
    key: Key = ANYBODY
    traceparent: str = ""  # the caller's W3C trace context, if it sent one
    received: float = field(default_factory=time.monotonic)
    received_unix: float = field(default_factory=time.time)
    error: RequestError | None = None  # what ended it with a status
    jobs: Sequence[Job] = ()  # what the engine took on for it
    is_complete: bool = False  # its handler came to its end
    status: str = ""  # name of the grpc.StatusCode, once it is over
    seconds: float = 0.0

    def end(self, status: str) -> None:
        self.status = status
        self.seconds = time.monotonic() - self.received


_CURRENT: ContextVar[Call] = ContextVar("call")


def enter(call: Call) -> None:
    """Makes it the current call of the running task, which is gRPC's own for one call."""
    _CURRENT.set(call)


def current_call() -> Call:
    """The call that the running task serves; outside of any, one of anybody's."""
    return _CURRENT.get(None) or Call()
