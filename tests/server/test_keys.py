"""Tokens: who is let in, with how much, and that the file of keys can change."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from typer.testing import CliRunner

from pagestream.server import __main__ as cli
from pagestream.server.door import Door
from pagestream.server.keys import Key, KeyFile
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import model_pb2
from tests.support.client import gather, refused
from tests.support.service import Service, stop
from tests.support.waiting import WAIT, wait_until

MakeService = Callable[..., Service]


def entry(name: str, token: str, **fields: Any) -> str:
    lines = [f'name = "{name}"', f'sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"']
    lines += [f"{field} = {value!r}" for field, value in fields.items()]
    return "\n".join(["[[key]]", *lines, ""])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(
        entry("plain", "one")
        + entry("bound", "two", max_requests=1, max_prompt_tokens=8, max_tokens=4)
        + entry("named", "three", tenant="shared")
        + entry("alike", "four", tenant="shared")
    )
    return path


@pytest.fixture
def locked(make_service: MakeService, file: Path) -> Service:
    return make_service(listening={"door": Door(KeyFile(file))})


def open_stream(service: Service, token: str | None, *more: tuple[str, str], **fields: Any) -> Any:
    metadata = [*more, *([("authorization", f"Bearer {token}")] if token is not None else [])]
    return service.client.generation.GenerateStream(
        pb.GenerateStreamRequest(**fields), timeout=WAIT, metadata=tuple(metadata)
    )


@pytest.mark.parametrize(
    "authorization", [None, "", "one", "Basic one", "Bearer", "Bearer ", "Bearer oneone", "Bearer On"]
)
def test_without_a_known_token_everything_but_health_is_refused(locked: Service, authorization: str | None) -> None:
    metadata = None if authorization is None else (("authorization", authorization),)
    with refused("UNAUTHENTICATED", "UNAUTHENTICATED"):
        gather(locked.client.generation.GenerateStream(pb.GenerateStreamRequest(text="x"), WAIT, metadata=metadata))
    with refused("UNAUTHENTICATED", "UNAUTHENTICATED"):
        locked.client.models.GetModel(model_pb2.GetModelRequest(), timeout=WAIT, metadata=metadata)
    reflection = reflection_pb2_grpc.ServerReflectionStub(locked.client.channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    with refused("UNAUTHENTICATED", "UNAUTHENTICATED"):
        list(reflection.ServerReflectionInfo(iter([question]), timeout=WAIT, metadata=metadata))
    assert locked.client.health("liveness", timeout=WAIT) == 1
    assert locked.metrics.read().values["requests_rejected_total"]["unauthenticated",] == 3


def test_a_refusal_needs_nothing_of_the_request(locked: Service) -> None:
    """A call that has not sent its message yet: what strangers send is not read."""
    method = locked.client.channel.stream_stream("/pagestream.v1.GenerationService/GenerateStream")
    never = threading.Event()
    call = method(iter(never.wait, True), timeout=WAIT)
    with refused("UNAUTHENTICATED", "UNAUTHENTICATED"):
        next(call)
    never.set()


def test_a_known_token_is_let_in(locked: Service) -> None:
    assert gather(open_stream(locked, "one", text="abc", stop=stop(3))).text == "abc"


def test_a_key_has_limits_of_its_own(locked: Service) -> None:
    with refused("PERMISSION_DENIED", "KEY_LIMIT"):
        gather(open_stream(locked, "two", text="x" * 9))
    with refused("PERMISSION_DENIED", "KEY_LIMIT"):
        gather(open_stream(locked, "two", text="x", stop=stop(5)))
    answer = gather(open_stream(locked, "two", text="x" * 8))
    assert (answer.accepted.max_tokens, answer.text) == (4, "x" * 4)
    assert answer.finished.reason == pb.FINISH_REASON_MAX_TOKENS


def test_a_key_has_so_many_calls_at_once_and_gets_them_back(locked: Service) -> None:
    locked.rig.runner.hold()
    first = open_stream(locked, "two", text="x")
    next(first)
    with refused("RESOURCE_EXHAUSTED", "KEY_BUSY") as refusal:
        gather(open_stream(locked, "two", text="x"))
    assert refusal.got.retry_after == 1
    assert locked.metrics.read().values["requests_rejected_total"]["key_busy",] == 1
    next(open_stream(locked, "one", text="x", stop=stop(1)))
    first.cancel()
    locked.rig.runner.allow()
    wait_until(locked.is_idle, "the calls are over")
    assert gather(open_stream(locked, "two", text="x")).text == "xxxx"


def test_the_tenant_is_the_keys_own_word(locked: Service) -> None:
    """What a caller says of itself divides its own requests, and never makes it another key's tenant."""
    locked.rig.runner.hold()
    said = ("x-pagestream-tenant", "shared")
    callers = [("one",), ("one", said), ("three",), ("three", said), ("four",)]
    calls = [
        open_stream(locked, token, *more, text="x", stop=stop(1), request_id=str(index))
        for index, (token, *more) in enumerate(callers)
    ]
    for call in calls:
        next(call)
    tenants = {job.request.request_id: job.request.tenant for job in locked.streams.jobs}
    plain, plain_said, *shared = [tenants[str(index)] for index in range(len(callers))]
    assert len({plain, plain_said, *shared}) == 3
    assert len(set(shared)) == 1
    locked.rig.runner.allow()
    for call in calls:
        list(call)


def test_a_changed_file_counts_at_once_and_a_broken_one_does_not(
    locked: Service, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text(file.read_text() + "nonsense")
    assert gather(open_stream(locked, "one", text="a", stop=stop(1))).text == "a"
    assert "what was loaded before stays in use" in caplog.text
    file.write_text(entry("new", "five"))
    assert gather(open_stream(locked, "five", text="a", stop=stop(1))).text == "a"
    with refused("UNAUTHENTICATED", "UNAUTHENTICATED"):
        gather(open_stream(locked, "one", text="a"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("key = 1", "only tables"),
        ("other = 1", "only tables"),
        ("[[key]]\nname = 'a b'", "name must be"),
        ("[[key]]\nname = 'a'\nsha256 = 'abc'", "64 hex digits"),
        (entry("a", "t") + "\ncolour = 1", "colour is not a field"),
        (entry("a", "t", max_tokens=0), "at least 1"),
        (entry("a", "t", max_requests=True), "Invalid value"),
        (entry("a", "t") + entry("a", "u"), "same name"),
        (entry("a", "t") + entry("b", "t"), "same sha256"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_name(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(OSError, match=sentence) as error:
        KeyFile(path)
    assert str(path) in str(error.value)


def test_the_command_makes_a_token_that_its_entry_lets_in(tmp_path: Path) -> None:
    made = CliRunner().invoke(cli.app, ["token", "team.a", "--tenant", 'a "b"', "--max-requests", "3"])
    assert made.exit_code == 0
    path, token = tmp_path / "keys.toml", made.stderr.strip()
    path.write_text(made.stdout)
    assert KeyFile(path).find(token) == Key("team.a", 'a "b"', max_requests=3)
    assert token not in made.stdout
    assert CliRunner().invoke(cli.app, ["token", "a b"]).exit_code == 2


def test_the_client_commands_send_a_token(locked: Service) -> None:
    command = ["generate", "hello", "--raw", "--max-tokens", "5", "--address", locked.address]
    assert CliRunner().invoke(cli.app, [*command, "--token", "one"]).stdout == "hello\n"
    assert CliRunner().invoke(cli.app, command, env={"PAGESTREAM_TOKEN": "one"}).stdout == "hello\n"
    denied = CliRunner().invoke(cli.app, command)
    assert (denied.exit_code, denied.stdout) == (cli.FAILED, "")
    assert "UNAUTHENTICATED" in denied.stderr
    assert grpc.StatusCode.UNAUTHENTICATED.name in denied.stderr
