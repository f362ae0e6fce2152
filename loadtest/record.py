"""What is known of one request when it has ended: a line of requests.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["ok", "cancelled", "killed", "deadline", "failed", "unfinished"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "cancelled", "killed", "deadline", "failed", "unfinished")


@dataclass
class ServerTimings:
    """What the server says of the request, seconds by its own clock."""

    queue: float
    prefill: float
    decode: float
    time_to_first_token: float
    predicted_time_to_first_token: float | None = None


@dataclass
class Record:
    """Moments are seconds from the beginning of the run, by the machine's monotonic clock."""

    session: int
    turn: int
    label: str
    prompt_tokens: int
    new_tokens: int  # asked for
    scheduled: float
    sent: float
    fault: str | None = None
    accepted: float | None = None
    tokens: list[float] = field(default_factory=list)  # a moment for each token; those of one message share theirs
    output_tokens: int = 0
    ended: float = 0.0
    outcome: Outcome = "unfinished"
    code: str = ""  # of a call that failed: the gRPC or HTTP status
    reason: str = ""  # of a refusal: ErrorInfo.reason
    message: str = ""
    cached_tokens: int = 0
    preemptions: int = 0
    server: ServerTimings | None = None

    @property
    def is_clean(self) -> bool:
        """Answered in full and read as it came: what latencies are taken from."""
        return self.outcome == "ok" and self.fault is None

    @property
    def time_to_first_token(self) -> float:
        return self.tokens[0] - self.sent

    def fail(self, code: str, reason: str, message: str) -> None:
        self.outcome = "deadline" if code == "DEADLINE_EXCEEDED" else "failed"
        self.code, self.reason, self.message = code, reason, message

    def to_json(self) -> str:
        fields = asdict(self)
        fields["tokens"] = [round(moment, 6) for moment in self.tokens]
        return json.dumps(fields)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Record:
        """The opposite of dataclasses.asdict, whose argument it uses up."""
        server = fields.pop("server")
        return cls(**fields, server=ServerTimings(**server) if server else None)


def read_records(path: Path) -> Iterator[Record]:
    with path.open() as lines:
        for line in lines:
            yield Record.of(json.loads(line))
