"""Who can be measured: how each is started, how it says that it is ready, and how it is reached.

Everyone gets as many threads as there are cores and 16-bit or smaller weights; all else is the default, but for prefix
caches (off: no prompt comes twice) and the number and size of llama.cpp's slots, which must be said.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peers.clients import GrpcClient, HttpClient, LlamaCppClient, VllmClient, WorkerClient
from peers.jobs import Client, FailedError
from peers.process import Process

THREADS = len(os.sched_getaffinity(0))
WORKERS = Path(__file__).parent / "workers"
OURS = "pagestream"

Connect = Callable[[Process], Awaitable[Client]]


@dataclass(frozen=True)
class Capacity:
    """What a scenario needs: so many streams at once, each of so many tokens at most."""

    streams: int
    context: int


@dataclass(frozen=True)
class Target:
    name: str
    needs: tuple[Path, ...]  # not installed without them
    command: Callable[[Capacity], list[str]]
    connect: Connect
    environment: Mapping[str, str] = field(default_factory=dict)
    worker: bool = False  # speaks on its pipes
    asks_version: tuple[str, ...] = ()  # a command that prints it

    @property
    def missing(self) -> Path | None:
        return next((path for path in self.needs if not path.exists()), None)

    def version(self) -> str:
        """Empty for ours: the commit says it."""
        if not self.asks_version:
            return ""
        asked = subprocess.run(self.asks_version, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603
        return " ".join((asked.stdout or asked.stderr).split())


def all_targets(peers: Path, model: Path) -> list[Target]:
    return [
        Target(OURS, (), _pagestream, _grpc),
        *(_openvino(peers / "openvino", weights) for weights in ("int8", "int4")),
        *(_llama_cpp(peers / "llama.cpp", weights) for weights in ("q4_0", "q8_0")),
        _worker("onnxruntime-int4", peers / "onnxruntime/venv", "onnxruntime-genai", peers / "onnxruntime/int4"),
        _vllm(peers),
        _worker("transformers-bf16", Path(sys.prefix), "transformers", model),
    ]


def _pagestream(_: Capacity) -> list[str]:
    # Answers to random tokens soon repeat themselves: guessing from them would flatter us.
    serve = [sys.executable, "-m", "pagestream.server", "serve", "--no-speculation"]
    return [*serve, "--grpc-port", "0", "--http-port", "0"]


async def _grpc(process: Process) -> Client:
    log = await process.log_until(r"ready:")
    address = re.search(r"gRPC on (\S+:\d+)", log)
    if address is None:
        raise FailedError("the server did not say where it listens")
    return GrpcClient(address[1])


def _worker(name: str, environment: Path, package: str, model: Path) -> Target:
    python, program = environment / "bin/python", WORKERS / f"run_{name.partition('-')[0]}.py"
    command = [str(python), str(program), str(model), str(THREADS)]
    offline = {"HF_HUB_OFFLINE": "1"}
    asks = _asks_version(python, package)
    return Target(name, (python, model), lambda _: command, _pipe, offline, worker=True, asks_version=asks)


def _asks_version(python: Path, package: str) -> tuple[str, ...]:
    return (str(python), "-c", f"import importlib.metadata; print(importlib.metadata.version({package!r}))")


async def _pipe(process: Process) -> Client:
    line = await process.stdout.readline()
    if not line:
        await process.wait()
        raise FailedError(process.why_it_died())
    if not json.loads(line).get("ready"):
        raise FailedError(f"a worker began with {line[:100]!r}")
    return WorkerClient(process.stdin, process.stdout)


def _openvino(folder: Path, weights: str) -> Target:
    return _worker(f"openvino-{weights}", folder / "venv", "openvino-genai", folder / weights)


def _llama_cpp(folder: Path, weights: str) -> Target:
    server, model, port = folder / "bin/llama-server", folder / f"{weights}.gguf", free_port()

    def command(capacity: Capacity) -> list[str]:
        place = ["--host", "127.0.0.1", "--port", str(port), "--threads", str(THREADS), "--no-webui"]
        context = str(capacity.streams * capacity.context)
        slots = ["--parallel", str(capacity.streams), "--ctx-size", context, "--no-kv-unified", "--cache-ram", "0"]
        return [str(server), "--model", str(model), *place, *slots]

    connect, asks = _http(LlamaCppClient(port), port), (str(server), "--version")
    return Target(f"llama.cpp-{weights}", (server, model), command, connect, asks_version=asks)


def _vllm(peers: Path) -> Target:
    python, model, port = peers / "vllm/venv/bin/python", peers / "model", free_port()
    serve = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "m"]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    limits = ["--dtype", "bfloat16", "--max-model-len", "8192", "--no-enable-prefix-caching"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*serve, *place, *limits]
    connect, asks = _http(VllmClient(port), port), _asks_version(python, "vllm-cpu")
    return Target("vllm-bf16", (python, model), lambda _: command, connect, environment, asks_version=asks)


def _http(client: HttpClient, port: int) -> Connect:
    def healthy() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    async def connect(process: Process) -> Client:
        while not await asyncio.to_thread(healthy):
            process.must_be_alive()
            await asyncio.sleep(0.01)
        return client

    return connect


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
