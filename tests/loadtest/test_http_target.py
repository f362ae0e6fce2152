"""The OpenAI adapter against a small server that speaks what they all do."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pagestream.loadtest.faults import Fault
from pagestream.loadtest.record import Record
from pagestream.loadtest.target import Call, TargetError, TargetInfo, connect

FAILURES = ('{"error": {"message": "out of memory"}}', "{not json", "[1, 2]", '{"choices": [3]}', '{"choices": 7}')


class FakeOpenAi(BaseHTTPRequestHandler):
    """Answers `max_tokens` words, one a message, in chunks that end in the middle of lines."""

    bodies: list[dict[str, Any]]
    hung_up: threading.Event

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "fake", "max_model_len": 2048}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        if body["max_tokens"] > 100:
            self.send_error(429, "queue full")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(body)
        except (BrokenPipeError, ConnectionResetError):
            self.hung_up.set()

    def _stream(self, body: dict[str, Any]) -> None:
        self._say({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for _ in range(body["max_tokens"]):
            self._say({"choices": [{"delta": {"content": " word"}}]})
        if body["max_tokens"] == len(FAILURES):
            self.wfile.write(f"data: {FAILURES[len(self.bodies) - 1]}\n\ndata: [DONE]\n\n".encode())
            return
        words = len(body["messages"][0]["content"].split())
        self._say({"choices": [], "usage": {"prompt_tokens": words + 5, "completion_tokens": body["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _say(self, event: dict[str, Any]) -> None:
        line = f"data: {json.dumps(event)}\n\n".encode()
        for part in (line[:9], line[9:]):
            self.wfile.write(part)
            self.wfile.flush()


@pytest.fixture
def fake() -> Iterator[tuple[str, type[FakeOpenAi]]]:
    handler = type("Handler", (FakeOpenAi,), {"bodies": [], "hung_up": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


async def _send(url: str, call: Call) -> tuple[TargetInfo, Record]:
    target = connect(url)
    try:
        info = await target.describe()
        record = Record(0, 0, "", len(call.prompt), call.new_tokens, 0.0, target.clock())
        await target.send(call, record)
        return info, record
    finally:
        await target.close()


def test_every_word_has_its_stamp(fake: tuple[str, type[FakeOpenAi]]) -> None:
    url, handler = fake
    info, record = asyncio.run(_send(url, Call([0, 5, 25] * 10, 7, timeout=20)))
    assert (info.model, info.max_context) == ("fake", 2048)
    assert (record.outcome, record.prompt_tokens, record.output_tokens) == ("ok", 35, 7)
    assert len(record.tokens) == 7
    assert record.sent < record.tokens[0] <= record.tokens[-1]
    (body,) = handler.bodies
    assert (body["model"], body["max_tokens"], body["stream"]) == ("fake", 7, True)
    assert len(body["messages"][0]["content"].split()) == 30


def test_a_refusal_is_told(fake: tuple[str, type[FakeOpenAi]]) -> None:
    _, record = asyncio.run(_send(fake[0], Call([1], 101, timeout=20)))
    assert (record.outcome, record.code, record.tokens) == ("failed", "429", [])


def test_a_failure_in_the_stream_is_no_answer(fake: tuple[str, type[FakeOpenAi]]) -> None:
    """Whatever follows it; and no event breaks the client."""
    for _ in FAILURES:
        _, record = asyncio.run(_send(fake[0], Call([1], len(FAILURES), timeout=20)))
        assert (record.outcome, record.code, len(record.tokens)) == ("failed", "INTERNAL", len(FAILURES))
        assert record.message


def test_a_client_that_leaves_hangs_up(fake: tuple[str, type[FakeOpenAi]]) -> None:
    _, record = asyncio.run(_send(fake[0], Call([1], 100, timeout=20, fault=Fault("cancel", after_tokens=2))))
    assert (record.outcome, len(record.tokens)) == ("cancelled", 2)


def test_nobody_there_is_one_sentence() -> None:
    with pytest.raises(TargetError, match="no OpenAI-compatible server answers"):
        asyncio.run(_send("http://127.0.0.1:1", Call([1], 1, timeout=1)))
