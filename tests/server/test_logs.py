"""The log: one line for each call, valid JSON if asked for, and never a client's text, whatever goes wrong."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest

from pagestream.server.collector import make_registry
from pagestream.server.door import Door
from pagestream.server.keys import KeyFile
from pagestream.server.logs import LogThread, log_call, set_up_logging
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import tokenizer_pb2
from tests.support.client import refused
from tests.support.fakes import ByteTokenizer
from tests.support.service import KV_CAPACITY, MAX_CONTEXT, Service, stop
from tests.support.waiting import WAIT, wait_until

MakeService = Callable[..., Service]
SECRET = "s3cr3t"  # noqa: S105 - what no log may hold


class Said(io.StringIO):
    def getvalue(self) -> str:
        """With what waits to be written."""
        for handler in logging.getLogger().handlers:
            handler.flush()
        return super().getvalue()


@pytest.fixture
def logged(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """Everything that any logger says at DEBUG, in the format that the test is parametrised with."""
    root, said = logging.getLogger(), Said()
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    set_up_logging(getattr(request, "param", "text"), said.write)
    root.setLevel(logging.DEBUG)
    yield said
    root.handlers[:] = before
    root.setLevel(level)


def calls_in(said: io.StringIO, count: int) -> list[str]:
    """The lines about calls, when there are so many."""
    lines = lambda: [line for line in said.getvalue().splitlines() if "pagestream.request" in line]  # noqa: E731
    wait_until(lambda: len(lines()) >= count, f"{count} calls are logged")
    return lines()


@pytest.mark.parametrize("logged", ["json"], indirect=True)
def test_each_call_is_one_json_object(make_service: MakeService, logged: io.StringIO) -> None:
    service = make_service(listening={"sinks": [log_call]})
    list(service.client.open(text="abc", request_id="i\nd", stop=stop(2), n=2))
    with refused("NOT_FOUND", "UNKNOWN_MODEL"):
        service.client.generate(text="abc", model="other")
    answered, turned_away = [json.loads(line) for line in calls_in(logged, 2)]
    assert all(json.loads(line) for line in logged.getvalue().splitlines())
    assert (answered["level"], answered["method"], answered["status"]) == ("INFO", "GenerateStream", "OK")
    assert (answered["request_id"], answered["finish_reasons"]) == ("i\nd", "max_tokens")
    assert (answered["prompt_tokens"], answered["output_tokens"], answered["preemptions"]) == (3, 4, 0)
    times = [answered[f"{name}_seconds"] for name in ("queue", "prefill", "decode")]
    assert 0 < sum(times) <= answered["seconds"]
    assert answered["time_to_first_token_seconds"] == pytest.approx(sum(times[:2]), abs=1e-5)
    assert (turned_away["status"], turned_away["reason"]) == ("NOT_FOUND", "UNKNOWN_MODEL")
    assert "request_id" not in turned_away


def test_a_line_of_text_stays_one_line(make_service: MakeService, logged: io.StringIO) -> None:
    """A request's name is its client's to choose; it must not forge lines."""
    service = make_service(listening={"sinks": [log_call]})
    service.client.stream(text="abc", request_id="x\n2026-01-01 INFO fine\x1b[2J", stop=stop(1))
    [line] = calls_in(logged, 1)
    assert line.isprintable()
    assert r'request_id="x\n2026-01-01 INFO fine\u001b[2J"' in line


def test_facts_are_logged_only_at_debug(make_service: MakeService, caplog: pytest.LogCaptureFixture) -> None:
    service = make_service(listening={"sinks": [log_call]})
    with caplog.at_level(logging.DEBUG, "pagestream.request"):
        service.client.tokenizer.Encode(tokenizer_pb2.EncodeRequest(text="x"), timeout=WAIT)
        wait_until(lambda: len(caplog.records) == 1, "the call is over")
    assert caplog.records[0].levelno == logging.DEBUG


class _Talkative(ByteTokenizer):
    """Fails in a way that quotes the text, as libraries do."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if text.endswith("!"):
            raise ValueError(f"cannot encode {text!r}")
        return super().encode(text, add_special_tokens=add_special_tokens)


def _failures(service: Service) -> list[dict[str, Any]]:
    """Requests that end in every way a request can be told to, each with the secret wherever a client can put it."""
    base: dict[str, Any] = {"text": SECRET, "stop": stop(2, stop_strings=[f"{SECRET}{SECRET}"])}
    message = pb.ChatMessage(role=SECRET, content=SECRET)
    return [
        base,
        base | {"n": 3},
        {"chat": pb.Chat(messages=[message]), "stop": stop(2)},
        base | {"sampling": pb.SamplingConfig(top_p=9)},
        base | {"stop": stop(2, stop_strings=[SECRET * 100])},
        base | {"stop": stop(0)},
        base | {"model": "other"},
        base | {"text": SECRET * (KV_CAPACITY // len(SECRET) + 1)},
        base | {"text": SECRET * (MAX_CONTEXT // len(SECRET) + 1)},
        base | {"text": f"{SECRET}!"},  # a library's failure
        base | {"request_id": "fault"},
        base | {"request_id": "deadline", "timeout": 0.05, "stop": stop(900)},
    ]


def _ends(service: Service) -> str:
    """Makes all the calls and returns all that their ends say."""
    said = []
    for fields in _failures(service):
        call = service.client.open(tenant=SECRET, **fields)
        try:
            list(call)
        except grpc.RpcError as error:
            said += [str(error.details()), str(error.trailing_metadata())]  # type: ignore[attr-defined]
    service.rig.runner.hold()
    waiting = service.client.open(text=SECRET, tenant=SECRET)
    next(waiting)
    waiting.cancel()
    wait_until(lambda: not service.streams.jobs, "the server has seen it")
    service.rig.runner.allow()
    strange = service.client.channel.unary_unary("/pagestream.v1.GenerationService/Generate")
    with refused("INVALID_ARGUMENT", "INVALID_FIELD") as refusal:
        strange(b"\xff" + SECRET.encode(), timeout=WAIT, metadata=(("authorization", f"Bearer {SECRET}"),))
    return "\n".join([*said, refusal.got.message])


def test_no_text_of_a_client_is_logged_measured_or_sent_back(make_service: MakeService, logged: io.StringIO) -> None:
    service = make_service(
        tokenizer=_Talkative("{% for m in messages %}{{ raise_exception('not this way') }}{% endfor %}"),
        listening={"sinks": [log_call]},
    )
    service.rig.runner.faults["fault"] = RuntimeError("broken")
    ends = _ends(service)
    service.rig.engine.drain(retry_after_seconds=1.0)
    with suppress(grpc.RpcError):
        service.client.stream(text=SECRET)
    calls_in(logged, len(_failures(service)) + 3)
    wait_until(service.is_idle, "all calls are over")
    for reason in ("INVALID_FIELD", "UNKNOWN_MODEL", "PROMPT_EXCEEDS", "ENGINE_FAULT", "DRAINING", "status=CANCELLED"):
        assert reason in logged.getvalue(), reason
    handled = service.metrics.read().values["grpc_server_handled_total"]
    assert {code for (_, code), count in handled.items() if count} >= {
        "OK",
        "CANCELLED",
        "INVALID_ARGUMENT",
        "INTERNAL",
    }
    for place in (ends, logged.getvalue(), generate_latest(make_registry(service.metrics)).decode()):
        assert SECRET not in place


def test_a_wrong_token_is_not_repeated(make_service: MakeService, logged: io.StringIO, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("")
    service = make_service(listening={"sinks": [log_call], "door": Door(KeyFile(path))})
    metadata = (("authorization", f"Bearer {SECRET}"),)
    with refused("UNAUTHENTICATED", "UNAUTHENTICATED") as refusal:
        service.client.generation.Generate(pb.GenerateRequest(text=SECRET), timeout=WAIT, metadata=metadata)
    [line] = calls_in(logged, 1)
    assert "UNAUTHENTICATED" in line
    assert SECRET not in logged.getvalue() + refusal.got.message


@pytest.mark.parametrize("streams", [False, True])
def test_a_call_that_ends_at_its_deadline_is_not_said_to_be_cancelled(
    make_service: MakeService, logged: io.StringIO, *, streams: bool
) -> None:
    service = make_service(listening={"sinks": [log_call]})
    service.rig.runner.hold()
    generation = service.client.generation
    late = (
        generation.GenerateStream(pb.GenerateStreamRequest(text="x"), timeout=0.2)
        if streams
        else generation.Generate.future(pb.GenerateRequest(text="x"), timeout=0.2)
    )
    assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    [line] = calls_in(logged, 1)
    assert "status=DEADLINE_EXCEEDED" in line


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    """As a full pipe does, it makes whoever writes wait. What is too much is dropped, and counted when it goes on."""
    reads, lines = threading.Event(), list[str]()

    def write(line: str) -> None:
        reads.wait(WAIT)
        lines.append(line)

    handler = LogThread(write)
    count = 15_000
    for number in range(count):
        handler.emit(logging.makeLogRecord({"msg": str(number)}))
    handler.flush()  # gives up
    assert lines == []
    reads.set()
    handler.flush()
    handler.emit(logging.makeLogRecord({"msg": "on"}))
    handler.flush()
    assert lines[-1] == "on\n"
    [dropped] = [int(line.split()[1]) for line in lines if "dropped" in line]
    assert 0 < dropped == count + 1 - len(lines)
