"""`make demo`: serves the default model, streams one answer over gRPC, says what it cost, and stops the server."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from threading import Thread

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from rich.console import Console
from rich.text import Text

from pagestream.server.client import Answer, CallError, Client, summary
from pagestream.v1.generation_pb2 import Chat, ChatMessage, GenerateStreamRequest, StopConfig

QUESTION = "Why is the sky blue? Answer in two sentences."
MAX_TOKENS = 80
START_SECONDS = 120.0
STOP_SECONDS = 40.0  # more than the grace the server gives to answers that still run

NEXT = """
[bold]Where to look next[/]
  make serve                       the same server, on ports 50051 and 8080, until Ctrl-C
  .venv/bin/pagestream chat        a chat with it, from another terminal
  http://localhost:8080/           its live page: latency by context length, who waits, the KV pool
  README.md                        one request in eight hops, models, settings, metrics
  make test                        every test that needs no GPU"""


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


class Server:
    """A `pagestream serve` of our own, on free ports of this machine."""

    def __init__(self) -> None:
        self.grpc_port, http_port = _free_ports()
        ports = ["--grpc-port", str(self.grpc_port), "--http-port", str(http_port)]
        self._process = subprocess.Popen(  # noqa: S603 - fixed words and two numbers
            [sys.executable, "-m", "pagestream.server", "serve", *ports],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.last_lines: deque[str] = deque(maxlen=15)
        self._reader = Thread(target=self._read, daemon=True)  # a pipe that nobody reads would stop the server
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.last_lines.append(line.rstrip())

    def wait_until_serving(self, client: Client, terminal: Console) -> None:
        """Shows what the server says until its health is SERVING. DemoError if it ends first or takes too long."""
        health = HealthStub(client.channel)
        deadline = time.monotonic() + START_SECONDS
        with terminal.status("[dim]starting") as status:
            while not _is_serving(health):
                if time.monotonic() > deadline:
                    raise DemoError(f"the server was not ready within {START_SECONDS:g} s")
                with suppress(subprocess.TimeoutExpired):
                    code = self._process.wait(timeout=0.2)
                    self._reader.join()
                    raise DemoError(f"the server ended with exit code {code} before it was ready")
                if self.last_lines:
                    line = self.last_lines[-1]
                    status.update(Text(line.partition(": ")[2] or line, style="dim"))  # without time and logger

    def peak_memory(self) -> int:
        """The most bytes that it ever had resident."""
        (line,) = (
            line for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines() if "VmHWM" in line
        )
        return int(line.split()[1]) * 1024

    def stop(self) -> int:
        """The exit code after SIGTERM, or after SIGKILL if it takes too long. Safe to call again."""
        self._process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_SECONDS)
        finally:  # also when Ctrl-C interrupts the wait
            self._process.kill()
            self._process.wait()
        return self._process.returncode


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def _is_serving(health: HealthStub) -> bool:
    try:
        response = health.Check(HealthCheckRequest(service=""), timeout=2.0)
    except grpc.RpcError:  # it does not listen yet
        return False
    return bool(response.status == HealthCheckResponse.SERVING)


def _run(server: Server, terminal: Console) -> None:
    """The whole show. Raises CallError or DemoError."""
    terminal.print("Starting a server with the default model")
    started = time.monotonic()
    with Client(f"127.0.0.1:{server.grpc_port}") as client:
        server.wait_until_serving(client, terminal)
        terminal.print(f"Ready after {time.monotonic() - started:.1f} s; asking it over gRPC\n")
        terminal.print(f"[bold]> {QUESTION}")
        request = GenerateStreamRequest(
            chat=Chat(messages=[ChatMessage(role="user", content=QUESTION)]), stop=StopConfig(max_tokens=MAX_TOKENS)
        )
        answer = Answer()
        answer.receive(client.stream(request), lambda text: terminal.out(text, end=""), terminal)
    if answer.finished is None:
        raise DemoError("the stream ended without Finished")
    terminal.print(f"\n\n{summary(answer.finished)}", style="bold")
    terminal.print(f"The server has taken {server.peak_memory() / 1e6:.0f} MB of memory at most", style="dim")
    terminal.print(NEXT)
    if code := server.stop():
        raise DemoError(f"the server ended with exit code {code}")
    terminal.print("\nThe server has stopped.")


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):  # by default these would end us and leave the server
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    terminal = Console(highlight=False, soft_wrap=True)
    server = Server()
    try:
        _run(server, terminal)
    except (CallError, DemoError) as error:
        server.stop()
        terminal.print(f"\nThe demo failed: {error}", style="bold red", markup=False)
        terminal.print("The last lines of the server:", *server.last_lines, sep="\n  ", style="dim", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
