"""The life of a real server process: when it is ready, how it stops, what it says when it cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pagestream.v1 import generation_pb2 as pb
from tests.support.certificates import make_pair
from tests.support.client import NOT_SERVING, SERVING, refused
from tests.support.process import ServerProcess
from tests.support.waiting import WAIT

PAGESTREAM = (sys.executable, "-m", "pagestream.server")
Serve = Callable[..., ServerProcess]
ONE_THREAD = ("--threads", "1")  # where other work runs beside it, threads that wait for each other are slow
UNREAD = pb.OutputConfig(logprobs=20)  # so large that a stream waits for its reader, whatever the machine does
CHAT = pb.Chat(messages=[pb.ChatMessage(role="user", content="The quick brown fox?")])


def stop(max_tokens: int, **fields: Any) -> pb.StopConfig:
    return pb.StopConfig(max_tokens=max_tokens, **fields)


@pytest.fixture
def slow_model(tiny_model_path: Path, tmp_path: Path) -> Path:
    """A model that loads for as long as its config.json, a pipe, has not been written."""
    folder = tmp_path / "slow"
    folder.mkdir()
    for file in tiny_model_path.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return folder


def test_a_server_tells_when_it_is_ready_and_stops_when_told(
    serve: Serve, slow_model: Path, tiny_model_path: Path
) -> None:
    server = serve(slow_model, *ONE_THREAD, ready=False)
    client = server.connect()
    watching = client.watch()
    assert next(watching) == NOT_SERVING
    assert client.health("liveness") == SERVING
    with refused("UNAVAILABLE", "LOADING"):
        client.stream(text="x")
    (slow_model / "config.json").write_text((tiny_model_path / "config.json").read_text())
    assert next(watching) == SERVING
    assert client.stream(chat=CHAT, stop=stop(2)).finished.usage.output_tokens == 2
    client.close()
    server.terminate()
    assert server.wait_for_exit() == 0
    assert "Traceback" not in "".join(server.log)


def test_a_server_that_is_still_loading_stops_when_told(serve: Serve, slow_model: Path) -> None:
    server = serve(slow_model, *ONE_THREAD, ready=False)
    server.terminate()
    assert server.wait_for_exit() == 0
    assert not any("ready:" in line or "Traceback" in line for line in server.log)


def test_sigterm_lets_a_stream_finish(serve: Serve, tiny_model_path: Path) -> None:
    server = serve(tiny_model_path, *ONE_THREAD, "--drain-seconds", "120")
    client = server.connect()
    running = client.open(text="x", stop=stop(1000, ignore_eos=True), output=UNREAD)
    next(running)
    server.terminate()
    server.wait_for_log("draining")
    with refused("UNAVAILABLE", "DRAINING") as refusal:
        client.stream(text="x")
    assert refusal.got.retry_after == 120
    assert list(running)[-1].finished.usage.output_tokens == 1000
    assert server.wait_for_exit() == 0
    client.close()


def test_a_hangup_drains_and_a_second_signal_ends_at_once(serve: Serve, tiny_model_path: Path) -> None:
    server = serve(tiny_model_path, *ONE_THREAD)
    client = server.connect()
    running = client.open(text="x", stop=stop(4000, ignore_eos=True), output=UNREAD)
    next(running)
    server.process.send_signal(signal.SIGHUP)  # the terminal was closed
    server.wait_for_log("draining")
    server.terminate()
    with refused("UNAVAILABLE", "DRAINING"):
        list(running)
    assert server.wait_for_exit() == 0
    client.close()


def test_when_the_grace_is_over_the_rest_ends_with_what_it_has(serve: Serve, tiny_model_path: Path) -> None:
    """A short answer ends inside the grace of four seconds; a long one and one that nobody reads do not."""
    server = serve(tiny_model_path, *ONE_THREAD, "--drain-seconds", "4", "--max-running", "2")
    client = server.connect()
    watching = client.watch()
    assert next(watching) == SERVING
    endless: dict[str, Any] = {"text": "x", "stop": stop(4000, ignore_eos=True), "output": UNREAD}
    calls = [client.open(text="x", stop=stop(20, ignore_eos=True)), client.open(**endless)]
    calls += [server.connect().open(**endless), client.open(**endless)]
    for call in calls:
        next(call)
    server.terminate()
    assert next(watching) == NOT_SERVING
    with refused("UNAVAILABLE", "DRAINING") as refusal:
        client.stream(text="x")
    assert refusal.got.retry_after == 4
    assert list(calls[0])[-1].finished.usage.output_tokens == 20
    for call in (calls[1], calls[3]):
        with refused("UNAVAILABLE", "DRAINING") as refusal:
            list(call)
        assert refusal.got.usage is not None
        assert refusal.got.usage.prompt_tokens == 1
    assert server.wait_for_exit() == 0
    client.close()


def test_a_port_that_is_taken_is_said_once(serve: Serve, tiny_model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "pagestream.server", "serve", str(tiny_model_path)]
        command += ["--grpc-port", str(port), "--http-port", "0"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)
    assert run.returncode == 1
    expected = f"pagestream: the gRPC port 127.0.0.1:{port} cannot be opened (Address already in use): "
    assert run.stderr.splitlines() == [expected + "choose another --grpc-port or --host"]


def test_a_locked_server_serves_who_may_and_drains_by_its_admin_socket(
    serve: Serve, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything of its security at once, with spans that nobody receives."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    authority = make_pair(tmp_path, "authority")
    own = make_pair(tmp_path, "own", authority)
    made = subprocess.run([*PAGESTREAM, "token", "me"], capture_output=True, text=True, check=True)
    (tmp_path / "keys.toml").write_text(made.stdout)
    socket_path = tmp_path / "admin.sock"
    server = serve(
        tiny_model_path, *ONE_THREAD, "--tls-cert", str(own.cert), "--tls-key", str(own.key),
        "--keys-file", str(tmp_path / "keys.toml"), "--admin-socket", str(socket_path), "--log-format", "json",
    )  # fmt: skip
    command = [*PAGESTREAM, "generate", "x", "--max-tokens", "2", "--address", server.address]
    command += ["--tls-ca", str(authority.cert)]
    strange = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (strange.returncode, "UNAUTHENTICATED" in strange.stderr) == (1, True)
    known = subprocess.run([*command, "--token", made.stderr.strip()], capture_output=True, text=True, check=True)
    assert "2 answer tokens" in known.stderr
    admin = [*PAGESTREAM, "admin", "--socket", str(socket_path)]
    state = subprocess.run([*admin, "state"], capture_output=True, text=True, check=True)
    assert json.loads(state.stdout)["state"] == "ready"
    subprocess.run([*admin, "drain"], check=True)
    assert server.wait_for_exit() == 0
    assert not socket_path.exists()
    calls = [json.loads(line) for line in server.log if "pagestream.request" in line]
    assert [(call["status"], call.get("key")) for call in calls] == [("UNAUTHENTICATED", None), ("OK", "me")]
    assert made.stderr.strip() not in "".join(server.log)
