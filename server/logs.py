"""What the server says: lines for people, or JSON objects for machines. Never a text of a client's.

Each call that asks for tokens, and each that is refused, gets one line of `request_line` when it is over.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from queue import Full, Queue
from typing import Any

from pagestream.server.call import Call
from pagestream.server.config import LogFormat

_MOST_WAITING = 10_000  # lines
_PLAIN = re.compile(r"[\w.:/#+-]+", re.ASCII)
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_log = logging.getLogger("pagestream.request")


def set_up_logging(kind: LogFormat, write: Callable[[str], object] | None = None) -> None:
    """To standard error, or to `write`."""
    handler = LogThread(write or _to_stderr)
    handler.setFormatter(_JsonFormatter() if kind == "json" else _TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _to_stderr(line: str) -> None:
    os.write(2, line.encode(errors="backslashreplace"))  # not sys.stderr, whose lock the interpreter wants when it ends


class LogThread(logging.Handler):
    """Has a thread write the lines: whoever reads them, through a pipe, may stop to, and the server must not. Lines
    beyond those that may wait are dropped and counted."""

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__()
        self._write = write
        self._lines: Queue[str] = Queue(_MOST_WAITING)
        self._dropped = 0
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record) + "\n")
        except Full:
            self._dropped += 1
        except Exception:  # noqa: BLE001 - as logging wants it: what cannot be formatted fails no request
            self.handleError(record)

    def flush(self) -> None:
        """When the process ends: waits a second at most for what is left."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, 1.0)

    def _run(self) -> None:
        told = 0  # of those that were dropped
        while True:
            line = self._lines.get()
            if dropped := self._dropped - told:
                told += dropped
                said = f"{dropped} lines dropped: nobody read them"
                warning = {"name": __name__, "levelname": "WARNING", "msg": said}
                line += self.format(logging.makeLogRecord(warning)) + "\n"
            with suppress(OSError):  # nobody will read any more
                self._write(line)
            self._lines.task_done()


def log_call(call: Call) -> None:
    """One line for an ended call; at level DEBUG for one that only asked for facts and got them."""
    level = logging.INFO if call.jobs or call.status != "OK" else logging.DEBUG
    if _log.isEnabledFor(level):
        _log.log(level, "call", extra={"fields": call_facts(call)})


def call_facts(call: Call) -> dict[str, Any]:
    """What is to be told of an ended call; times in seconds. Of several answers, the sums and the first one's times."""
    facts: dict[str, Any] = {"method": call.method.rpartition("/")[2], "status": call.status}
    if call.error is not None:
        facts["reason"] = call.error.reason
    if call.key.name:
        facts["key"] = call.key.name
    trace = _TRACE.fullmatch(call.traceparent)
    if trace:
        facts["trace_id"] = trace[1]
    facts["seconds"] = round(call.seconds, 6)
    if call.jobs:
        request, timings = call.jobs[0].request, call.jobs[0].timings()
        reasons = [job.finish_reason.value for job in call.jobs if job.finish_reason is not None]
        facts |= {
            "request_id": request.request_id,
            "tenant": request.tenant,
            "finish_reasons": ",".join(dict.fromkeys(reasons)),
            "prompt_tokens": request.num_prompt_tokens,
            "cached_tokens": request.num_cached or 0,
            "output_tokens": sum(job.request.num_output_tokens for job in call.jobs),
            "preemptions": sum(job.request.num_preemptions for job in call.jobs),
        }
        for name in ("queue", "prefill", "decode", "time_to_first_token"):
            seconds = getattr(timings, name)
            if seconds is not None:
                facts[f"{name}_seconds"] = round(seconds, 6)
    return facts


class _TextFormatter(logging.Formatter):
    """One line, also where a client's name for its request has control characters."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        fields = getattr(record, "fields", {})
        pairs = [f"{name}={_quote(value)}" for name, value in fields.items() if value != ""]
        line = " ".join([super().formatMessage(record), *pairs])
        return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _quote(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
