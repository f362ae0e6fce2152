"""The terminal side of gRPC, `generate` and `chat` among it, against a scripted server."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import Parse
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status
from typer.testing import CliRunner, Result

from pagestream.server.__main__ import app
from pagestream.server.client import Client, summary
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import model_pb2
from pagestream.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from pagestream.v1.model_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server

WAIT = 20.0  # seconds, far more than anything here takes
PAGESTREAM = (sys.executable, "-m", "pagestream.server")
CTRL_C, CTRL_D = "\x03", "\x04"
Context, Event = grpc.ServicerContext, pb.GenerateStreamResponse
HANG = Event()  # in a script: from here on wait until the client has gone


def refusal(code: grpc.StatusCode, message: str, *details: ErrorInfo | RetryInfo) -> Status:
    status = Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def delta(text: str) -> Event:
    return Event(delta=pb.Delta(text=text))


def answer(*texts: str) -> list[Event | Status]:
    timings = pb.Timings(time_to_first_token=Duration(nanos=250_000_000), decode=Duration(seconds=2))
    usage = pb.Usage(prompt_tokens=1234, output_tokens=11)
    finished = pb.Finished(reason=pb.FINISH_REASON_MAX_TOKENS, usage=usage, timings=timings)
    accepted = pb.Accepted(request_id="r", queue_position=2)
    progress = pb.PrefillProgress(computed_tokens=512, total_tokens=1234)
    start = [Event(accepted=accepted), Event(prefill_progress=progress)]
    return [*start, *map(delta, texts), Event(finished=finished)]


class ScriptedServer(GenerationServiceServicer, ModelServiceServicer):
    """Answers the n-th request with the n-th script and remembers what it was asked."""

    def __init__(self) -> None:
        self.scripts: queue.Queue[list[Event | Status]] = queue.Queue()
        self.requests: list[pb.GenerateStreamRequest] = []
        self.cancelled = threading.Event()  # the client of a script that hangs has gone
        self.address = ""

    def GenerateStream(self, request: pb.GenerateStreamRequest, context: Context) -> Iterator[Event]:  # noqa: N802
        self.requests.append(request)
        script = self.scripts.get(timeout=WAIT)
        if HANG in script:
            context.add_callback(self.cancelled.set)
        for event in script:
            if isinstance(event, Status):
                context.abort_with_status(rpc_status.to_status(event))
            elif event is HANG:
                self.cancelled.wait(2 * WAIT)  # longer than a test waits, so that giving up here cannot pass for it
            else:
                yield event

    def GetModel(  # noqa: N802
        self, _request: model_pb2.GetModelRequest, _context: Context
    ) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=model_pb2.ModelInfo(name="models/tiny", max_context_tokens=2048))


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    running = grpc.server(ThreadPoolExecutor(max_workers=4))
    add_GenerationServiceServicer_to_server(scripted, running)
    add_ModelServiceServicer_to_server(scripted, running)
    scripted.address = f"127.0.0.1:{running.add_insecure_port('127.0.0.1:0')}"
    running.start()
    yield scripted
    running.stop(grace=None).wait(WAIT)


def run(server: ScriptedServer, *arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [*arguments, "--address", server.address], input=stdin)


def test_generate_streams_the_text_and_sums_up_on_stderr(server: ScriptedServer) -> None:
    server.scripts.put(answer("Hel", "", "lo"))
    result = run(server, "generate", "Say hello")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    costs = "1,234 prompt tokens · 11 answer tokens · first token after 0.25 s · 5.0 tokens/s"
    assert result.stderr == f"{costs} · ended by max tokens\n"
    assert server.requests == [
        pb.GenerateStreamRequest(chat={"messages": [{"role": "user", "content": "Say hello"}]}, sampling={}, stop={})
    ]


def test_what_is_not_asked_for_stays_unset_and_what_is_arrives(server: ScriptedServer) -> None:
    server.scripts.put(answer())
    flags = "--max-tokens 5 --stop END --stop x --temperature 0.5 --top-k 3 --top-p 0.75 --min-p 0.25 --seed 0"
    flags += " --repetition-penalty 1.5 --presence-penalty -1 --frequency-penalty 2"
    run(server, "generate", "-", "--raw", *flags.split(), stdin="from a pipe\n")
    sampling = pb.SamplingConfig(temperature=0.5, top_k=3, top_p=0.75, min_p=0.25, seed=0)
    sampling.MergeFrom(pb.SamplingConfig(repetition_penalty=1.5, presence_penalty=-1, frequency_penalty=2))
    stop = pb.StopConfig(max_tokens=5, stop_strings=["END", "x"])
    assert server.requests == [pb.GenerateStreamRequest(text="from a pipe\n", sampling=sampling, stop=stop)]


def test_several_answers_are_printed_whole_with_their_index(server: ScriptedServer) -> None:
    pieces = [(0, "a"), (1, "b"), (0, "c"), (1, "d")]
    ends = [pb.Finished(index=index, usage={"prompt_tokens": 7 * (not index), "output_tokens": 2}) for index in (1, 0)]
    deltas = [Event(delta=pb.Delta(text=text, index=index)) for index, text in pieces]
    server.scripts.put([*deltas, *(Event(finished=end) for end in ends)])
    result = run(server, "generate", "x", "-n", "2")
    assert (result.exit_code, result.stdout) == (0, "[1] bd\n[0] ac\n")
    assert [line.split(" · ")[0] for line in result.stderr.splitlines()] == ["2 answer tokens", "7 prompt tokens"]
    assert server.requests[0].n == 2


def test_json_prints_every_event_on_a_line(server: ScriptedServer) -> None:
    script = answer("a\nb", "c")
    server.scripts.put(script)
    lines = run(server, "generate", "x", "--json").stdout.splitlines()
    assert [Parse(line, Event()) for line in lines] == script
    assert "prefill_progress" in json.loads(lines[1])


def test_a_refusal_is_one_sentence_with_reason_and_when_to_try_again(server: ScriptedServer) -> None:
    retry = RetryInfo(retry_delay=Duration(seconds=3))
    full = refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "256 requests wait", ErrorInfo(reason="QUEUE_FULL"), retry)
    server.scripts.put([full])
    result = run(server, "generate", "x")
    expected = "pagestream: RESOURCE_EXHAUSTED QUEUE_FULL: 256 requests wait; try again in 3 s\n"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", expected)


def test_a_stream_that_breaks_off_keeps_what_came(server: ScriptedServer) -> None:
    fault = refusal(grpc.StatusCode.INTERNAL, "request r failed", ErrorInfo(reason="ENGINE_FAULT"))
    server.scripts.put([delta("Once"), fault])
    result = run(server, "generate", "x")
    assert (result.exit_code, result.stdout) == (1, "Once\n")
    assert result.stderr == "pagestream: INTERNAL ENGINE_FAULT: request r failed\n"


def test_a_server_that_is_loading_is_not_mistaken_for_none(server: ScriptedServer) -> None:
    server.scripts.put([refusal(grpc.StatusCode.UNAVAILABLE, "the model is loading", ErrorInfo(reason="LOADING"))])
    result = run(server, "generate", "x")
    assert (result.exit_code, result.stderr) == (1, "pagestream: UNAVAILABLE LOADING: the model is loading\n")


@pytest.mark.parametrize("arguments", [["generate", "x"], ["chat"]])
def test_no_server_says_how_to_start_one(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--address", "127.0.0.1:1"])
    problem = "no pagestream server answers at 127.0.0.1:1 (Connection refused)"
    assert (result.exit_code, result.stderr) == (4, f"pagestream: {problem}; start one with: pagestream serve\n")


def test_what_is_not_utf_8_is_sent_as_replacement_characters(server: ScriptedServer) -> None:
    for _ in range(3):
        server.scripts.put(answer())
    latin = b"caf\xe9"
    command = [*PAGESTREAM, "generate", "--raw", "--address", server.address]
    subprocess.run([*command, latin], check=True, capture_output=True)
    subprocess.run([*command, "-"], input=latin, check=True, capture_output=True)
    assert [request.text for request in server.requests] == ["caf\ufffd"] * 2
    subprocess.run([*PAGESTREAM, "chat", "--address", server.address], input=latin, check=True, capture_output=True)
    assert server.requests[2].chat.messages[0].content == "caf\ufffd"


def test_a_number_too_large_for_its_field_is_wrong_usage(server: ScriptedServer) -> None:
    result = run(server, "generate", "x", "--seed", str(2**64))
    assert (result.exit_code, server.requests) == (2, [])
    assert result.stderr.startswith("pagestream: ")


def test_leaving_the_stream_cancels_the_call(server: ScriptedServer) -> None:
    server.scripts.put([delta("one"), HANG])
    with Client(server.address) as client:
        events = client.stream(pb.GenerateStreamRequest(text="x"))
        assert next(events).delta.text == "one"
        events.close()
        assert server.cancelled.wait(WAIT)


def test_one_token_has_no_rate() -> None:
    finished = pb.Finished(reason=pb.FINISH_REASON_END_OF_SEQUENCE, usage=pb.Usage(prompt_tokens=3, output_tokens=1))
    assert (
        summary(finished) == "3 prompt tokens · 1 answer tokens · first token after 0.00 s · ended by end of sequence"
    )


def test_chat_sends_the_whole_conversation_each_time(server: ScriptedServer) -> None:
    for text in ("Hi.", "Six.", "Who?"):
        server.scripts.put(answer(text))
    result = run(server, "chat", stdin="Hello\n\nTwice three?\n/help\n/reset\nRemember me?\n/quit\nnever read\n")
    assert result.exit_code == 0
    assert [[message.content for message in request.chat.messages] for request in server.requests] == [
        ["Hello"],
        ["Hello", "Hi.", "Twice three?"],
        ["Remember me?"],
    ]
    assert [message.role for message in server.requests[1].chat.messages] == ["user", "assistant", "user"]
    assert "Six.\n1,234 prompt tokens" in result.stdout


def test_chat_survives_a_refusal_and_forgets_the_turn(server: ScriptedServer) -> None:
    long = refusal(grpc.StatusCode.INVALID_ARGUMENT, "too long", ErrorInfo(reason="PROMPT_EXCEEDS_MODEL_CONTEXT"))
    server.scripts.put([long])
    server.scripts.put(answer("Yes."))
    result = run(server, "chat", stdin="endless\nStill there?\n")
    assert result.exit_code == 0
    assert "INVALID_ARGUMENT PROMPT_EXCEEDS_MODEL_CONTEXT: too long" in result.stdout
    assert [message.content for message in server.requests[1].chat.messages] == ["Still there?"]


class Terminal:
    """A command behind a pseudo-terminal: keys in, screen out. Ctrl-C is the key, as a person presses it."""

    def __init__(self, *command: str) -> None:
        spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", spawn, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin
        assert self._process.stdout
        self._keys, self._screen = self._process.stdin, self._process.stdout
        self._unread = b""

    def type(self, keys: str) -> None:
        self._keys.write(keys.encode())
        self._keys.flush()

    def read_until(self, marker: str) -> None:
        deadline = time.monotonic() + WAIT  # of the whole: a spinner never falls silent
        while marker.encode() not in self._unread:
            ready, _, _ = select.select([self._screen], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._screen.fileno(), 4096) if ready else b""
            assert piece, f"no {marker!r} in {self._unread!r}"
            self._unread += piece
        self._unread = self._unread.partition(marker.encode())[2]

    def exit_code(self) -> int:
        return self._process.wait(WAIT)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def terminal(server: ScriptedServer) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(*PAGESTREAM, *arguments, "--address", server.address))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(server: ScriptedServer, terminal: Callable[..., Terminal]) -> None:
    server.scripts.put([delta("Once upon"), HANG])
    server.scripts.put(answer("The end."))
    chat = terminal("chat")
    chat.read_until("> ")
    chat.type("Tell me a story\n")
    chat.read_until("Once upon")
    chat.type(CTRL_C)
    assert server.cancelled.wait(WAIT)
    chat.read_until("stopped")
    chat.read_until("> ")
    chat.type("Go on\n")
    chat.read_until("The end.")
    chat.read_until("> ")
    assert [message.content for message in server.requests[1].chat.messages] == [
        "Tell me a story",
        "Once upon",
        "Go on",
    ]
    chat.type(CTRL_D)
    assert chat.exit_code() == 0


def test_ctrl_c_at_the_prompt_leaves(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert run(server, "chat").exit_code == 0


def test_ctrl_c_cancels_generate(server: ScriptedServer, terminal: Callable[..., Terminal]) -> None:
    server.scripts.put([delta("Once upon"), HANG])
    generate = terminal("generate", "x")
    generate.read_until("Once upon")
    generate.type(CTRL_C)
    assert server.cancelled.wait(WAIT)
    assert generate.exit_code() == 130


def test_a_long_prompt_shows_how_far_it_is_read(server: ScriptedServer, terminal: Callable[..., Terminal]) -> None:
    server.scripts.put([*answer()[:2], HANG])
    generate = terminal("generate", "x")
    generate.read_until("reading the prompt: 512 of 1,234 tokens")
