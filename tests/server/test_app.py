"""The life of a server, from opening its ports to its exit, with a model that repeats its prompt.

The server runs in the main thread, where signals arrive; the test talks to it from another.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pagestream.model.errors import ModelError
from pagestream.server import app
from pagestream.server.config import ServerConfig
from pagestream.server.execution import MAX_FAILED_STEPS
from pagestream.server.metrics import Metrics
from pagestream.server.served import ServedModel
from pagestream.v1 import generation_pb2, model_pb2
from tests.support.client import NOT_SERVING, SERVING, Client, gather, refused
from tests.support.fakes import ByteTokenizer, Rig
from tests.support.service import served, stop
from tests.support.waiting import WAIT, wait_until


class LiveApp:
    """What the test's thread sees of the server in the main thread."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self.load = threading.Event()  # set it, and loading ends
        self.rig: Rig | None = None

    def assemble(self, _config: ServerConfig, metrics: Metrics, publish: Any, on_fault: Any) -> ServedModel:
        assert self.load.wait(WAIT)
        self.rig = Rig(metrics, publish=publish, on_fault=on_fault)
        return served(self.rig, ByteTokenizer())

    def wait_for_log(self, beginning: str) -> str:
        def found() -> str:
            return next((line for line in self._caplog.messages if line.startswith(beginning)), "")

        wait_until(lambda: bool(found()), f"the log says {beginning!r}")
        return found()

    def connect(self) -> Client:
        return Client(self.wait_for_log("gRPC on").split()[2].rstrip(";"))

    def http(self, path: str) -> tuple[int, str]:
        base = self.wait_for_log("gRPC on").split()[-1].removesuffix("/metrics")
        try:
            with urllib.request.urlopen(base + path, timeout=WAIT) as response:  # noqa: S310 - our own server
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def become_ready(self) -> tuple[Client, Rig]:
        self.load.set()
        self.wait_for_log("ready:")
        assert self.rig is not None
        return self.connect(), self.rig

    @staticmethod
    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)


RunApp = Callable[..., int]


@pytest.fixture
def run_app(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> RunApp:
    """Serves while the scenario runs beside it, and returns the exit code."""
    caplog.set_level(logging.INFO)

    def run(scenario: Callable[[LiveApp], None], host: str = "127.0.0.1") -> int:
        live = LiveApp(caplog)
        monkeypatch.setattr(app, "assemble", live.assemble)
        ended = threading.Event()

        def play() -> None:
            try:
                scenario(live)
            finally:
                while not ended.wait(0.2):  # whatever the scenario left: first a drain, then its end
                    live.terminate()
                    if live.rig is not None:
                        live.rig.runner.allow()

        with ThreadPoolExecutor(1) as thread:
            playing = thread.submit(play)
            # A signal that comes once the server has taken its handlers down must not end the test run.
            before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                code = app.serve(ServerConfig(host=host, grpc_port=0, http_port=0, drain_seconds=WAIT))
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                ended.set()
                playing.result(WAIT)
                signal.signal(signal.SIGTERM, before)
        return code

    return run


def test_readiness_follows_the_model(run_app: RunApp) -> None:
    """Alive but not ready while it loads, ready after, and watchers hear of it."""

    def scenario(live: LiveApp) -> None:
        client = live.connect()
        watching = client.watch("pagestream.v1.GenerationService")
        assert next(watching) == NOT_SERVING
        assert (client.health(), client.health("liveness")) == (NOT_SERVING, SERVING)
        assert live.http("/healthz") == (503, "loading")
        for call in (client.stream, client.generate):
            with refused("UNAVAILABLE", "LOADING") as refusal:
                call(text="x")
            assert (refusal.got.retry_after or 0) > 0
        with refused("UNAVAILABLE", "LOADING"):
            client.models.GetModel(model_pb2.GetModelRequest(), timeout=WAIT)
        live.become_ready()
        assert next(watching) == SERVING
        assert client.health() == SERVING
        wait_until(lambda: live.http("/healthz") == (200, "ok"), "HTTP says ready too")
        assert client.stream(text="ab", stop=stop(4)).text == "abab"
        client.close()

    assert run_app(scenario) == 0


def test_both_ports_open_on_ipv6(run_app: RunApp) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")

    def scenario(live: LiveApp) -> None:
        client = live.connect()
        assert client.health("liveness") == SERVING
        assert live.http("/healthz") == (503, "loading")
        client.close()

    assert run_app(scenario, "::1") == 0


def test_a_drain_finishes_what_runs_and_refuses_the_rest(run_app: RunApp) -> None:
    def scenario(live: LiveApp) -> None:
        client, rig = live.become_ready()
        watching = client.watch()
        assert next(watching) == SERVING
        rig.runner.hold()
        running = client.open(text="abc", stop=stop(6))
        next(running)
        live.terminate()
        assert next(watching) == NOT_SERVING
        assert client.health("liveness") == SERVING
        assert live.http("/healthz") == (503, "draining")
        with refused("UNAVAILABLE", "DRAINING") as refusal:
            client.stream(text="x")
        assert refusal.got.retry_after == WAIT
        rig.runner.allow()
        assert "".join(event.delta.text for event in running) == "abcabc"
        live.wait_for_log("stopped")
        client.close()

    assert run_app(scenario) == 0


def test_a_second_signal_ends_what_still_runs(run_app: RunApp) -> None:
    def scenario(live: LiveApp) -> None:
        client, rig = live.become_ready()
        rig.runner.hold()
        running = client.open(text="abc", stop=stop(500))
        next(running)
        rig.runner.wait_until_held()
        live.terminate()
        live.wait_for_log("draining")
        live.terminate()
        with refused("UNAVAILABLE", "DRAINING") as refusal, ThreadPoolExecutor(1) as thread:
            ending = thread.submit(gather, running)
            wait_until(lambda: _is_stopping(rig), "the engine is told to stop")
            rig.runner.allow(1)
            ending.result(WAIT)
        assert refusal.got.usage == generation_pb2.Usage(prompt_tokens=3, output_tokens=1)
        live.wait_for_log("stopped")
        client.close()

    assert run_app(scenario) == 0


def _is_stopping(rig: Rig) -> bool:
    return rig.engine.inbox._stop is not None


def test_a_signal_while_the_model_loads_ends_at_once(run_app: RunApp) -> None:
    def scenario(live: LiveApp) -> None:
        live.wait_for_log("gRPC on")
        live.terminate()
        live.wait_for_log("stopped")
        live.load.set()

    assert run_app(scenario) == 0


def test_an_engine_that_is_gone_is_not_ready(run_app: RunApp) -> None:
    def scenario(live: LiveApp) -> None:
        client, rig = live.become_ready()
        watching = client.watch()
        assert next(watching) == SERVING
        rig.runner.on_step = _raise_device_lost
        for _ in range(MAX_FAILED_STEPS):
            with refused("INTERNAL", "ENGINE_FAULT"):
                client.stream(text="x")
        assert next(watching) == NOT_SERVING
        assert live.http("/healthz") == (503, "failed")
        wait_until(lambda: client.health("liveness") == NOT_SERVING, "whoever started it knows that it must go")
        with refused("INTERNAL", "ENGINE_FAULT"):
            client.stream(text="x")
        client.close()

    assert run_app(scenario) == 0


def test_an_engine_that_hangs_is_not_ready_until_it_gets_on(run_app: RunApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "STALL_SECONDS", 0.2)

    def scenario(live: LiveApp) -> None:
        client, rig = live.become_ready()
        watching = client.watch()
        assert next(watching) == SERVING
        rig.runner.hold()
        running = client.open(text="abc", stop=stop(6))
        assert next(watching) == NOT_SERVING
        assert live.http("/healthz") == (503, "stalled")
        rig.runner.allow()
        assert next(watching) == SERVING
        assert "".join(event.delta.text for event in running) == "abcabc"
        client.close()

    assert run_app(scenario) == 0


def _raise_device_lost(_plan: object) -> None:
    raise RuntimeError("device lost")


def test_a_model_that_cannot_be_loaded_is_the_callers_error(run_app: RunApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> ServedModel:
        raise ModelError("no such model")

    monkeypatch.setattr(LiveApp, "assemble", staticmethod(fail))
    with pytest.raises(ModelError, match="no such model"):
        run_app(lambda _live: None)
