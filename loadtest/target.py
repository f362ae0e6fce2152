"""A server under test, whatever it speaks: what the rest of the package knows of it."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pagestream.loadtest.credentials import ANONYMOUS, Credentials
from pagestream.loadtest.faults import Fault
from pagestream.loadtest.record import Record
from pagestream.loadtest.shapes import Vocabulary
from pagestream.loadtest.spec import SpecError


class TargetError(Exception):
    """The server cannot be measured; the message is one sentence for the user."""


@dataclass(frozen=True)
class TargetInfo:
    """What the server says of itself."""

    model: str
    vocabulary: Vocabulary
    max_context: int | None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One request: greedy, past the end of sequence, exactly `new_tokens` long."""

    prompt: list[int]
    new_tokens: int
    timeout: float  # seconds
    fault: Fault | None = None

    def leaves_now(self, tokens: int) -> bool:
        """Whether a client that cancels or hangs up does so after so many tokens."""
        return self.fault is not None and self.fault.kind in ("cancel", "kill") and tokens >= self.fault.after_tokens

    @property
    def pause(self) -> float:
        """Seconds before each message is read."""
        return self.fault.seconds if self.fault and self.fault.kind == "slow" else 0.0


class Target(ABC):
    """One connection, in one event loop. `clock` gives the moments that are recorded."""

    clock: Callable[[], float] = staticmethod(time.monotonic)

    @abstractmethod
    async def describe(self) -> TargetInfo:
        """Raises TargetError if no server answers."""

    @abstractmethod
    async def send(self, call: Call, record: Record) -> list[int]:
        """Sends and reads to the end, which may be a refusal; `record` tells what happened. Gives the answer's tokens,
        as far as they came, for the next turn."""

    @abstractmethod
    async def close(self) -> None: ...


def connect(url: str, credentials: Credentials = ANONYMOUS) -> Target:
    """By the scheme: grpc://HOST:PORT is pagestream's own service, http:// or https:// anything that speaks OpenAI's
    chat completions. Raises SpecError, and TargetError for files of credentials that cannot be used."""
    parts = urlsplit(url)
    try:
        if address := grpc_address(url):
            from pagestream.loadtest.grpc_target import GrpcTarget  # noqa: PLC0415 - each target needs its own library

            return GrpcTarget(address, credentials)
        if parts.scheme in ("http", "https") and parts.hostname:
            from pagestream.loadtest.http_target import HttpTarget  # noqa: PLC0415

            return HttpTarget(url, credentials)
    except OSError as error:
        raise TargetError(str(error)) from error
    raise SpecError(f"{url!r} is no target: grpc://HOST:PORT, or http://HOST:PORT for an OpenAI-compatible server")


def grpc_address(url: str) -> str | None:
    """HOST:PORT of grpc://HOST:PORT; None for anything else."""
    match = re.fullmatch(r"grpc://([^/@?#]+:(\d{1,5}))/?", url, re.ASCII)
    return match[1] if match and 0 < int(match[2]) < 2**16 else None


def metrics_url(url: str, credentials: Credentials = ANONYMOUS) -> str:
    """Where a server at this URL usually shows its Prometheus metrics."""
    scheme, address = "https" if credentials.ca else "http", grpc_address(url)
    return f"{scheme}://{address.rpartition(':')[0]}:8080/metrics" if address else f"{url.rstrip('/')}/metrics"
