"""What a decode step is made of, through gRPC on the default model: attention, linear layers, the rest of the network,
sampling, the engine's Python; and the processor time of gRPC and its event loop beside it.

Method: the real server in its own process, whose functions in PARTS are timed by wrapping them (about a microsecond a
call, counted to the caller); the compiled network counts its own parts. Streams of 128 random prompt tokens decode
greedily; the step is wall time over steps, from when all streams decode until the first ends. Shares are of that time
and add up to 1: "Python" is what is left, so also waits for the interpreter. gRPC runs meanwhile in other threads: its
processor time, also over the step, is no part of the sum. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from record import read_bandwidth, save

from pagestream.kernels.outputs import Outputs
from pagestream.model import runner
from pagestream.model.network import Network
from pagestream.server.app import serve
from pagestream.server.config import ServerConfig, let_idle_threads_sleep
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub

PROMPT_TOKENS = 128
NEW_TOKENS = {1: 256, 8: 256, 32: 384}  # by streams: the first must not end before the last prompt is read
PARTS = (  # who calls it under which name, and what it is counted as
    (Network, "outputs", "network"),
    (runner, "sample", "sampling"),
)


# ---- the server's process


def serve_and_count() -> None:
    """Serves, and answers each line on stdin with nanoseconds by part, calls and processor time of the threads."""
    nanoseconds: Counter[str] = Counter()
    for owner, name, part in PARTS:
        setattr(owner, name, _timed(getattr(owner, name), part, nanoseconds))
    Network.outputs = _with_its_parts(Network.outputs, nanoseconds)  # type: ignore[method-assign]
    threading.Thread(target=_answer, args=(nanoseconds,), daemon=True).start()
    serve(ServerConfig(grpc_port=0, http_port=0, speculation=False))


def _timed(function: Callable[..., Any], part: str, nanoseconds: Counter[str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter_ns()
        result = function(*arguments, **options)
        nanoseconds[part] += time.perf_counter_ns() - started
        nanoseconds[f"{part} calls"] += 1
        return result

    return call


def _with_its_parts(outputs: Callable[..., Outputs], nanoseconds: Counter[str]) -> Callable[..., Outputs]:
    """Attention and products as the compiled decoder counts them."""

    def call(network: Network, *arguments: Any) -> Outputs:
        result = outputs(network, *arguments)
        for part, seconds in zip(("attention", "linear layers"), result.seconds or (), strict=False):
            nanoseconds[part] += round(seconds * 1e9)
        return result

    return call


def _answer(nanoseconds: Counter[str]) -> None:
    for _ in sys.stdin:
        reading = {**nanoseconds, "wall": time.perf_counter_ns(), "gRPC": _grpc_nanoseconds()}
        print(json.dumps(reading), flush=True)  # noqa: T201 - to the benchmark


def _grpc_nanoseconds() -> int:
    """Processor time of the event loop, which is the main thread, of who wakes it, and of gRPC's own threads."""
    ours = {thread.native_id: thread.name for thread in threading.enumerate()}
    total = 0
    for task in Path("/proc/self/task").iterdir():
        name = ours.get(int(task.name)) or (task / "comm").read_text()
        if name.startswith(("MainThread", "grpc", "event_engine")) or "_poll_wrapper" in name:
            total += int((task / "schedstat").read_text().split()[0])
    return total


# ---- the benchmark's process


class Server:
    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.address = ""
        for line in self._process.stderr or ():
            if match := re.search(r"gRPC on (\S+:\d+)", line):
                self.address = match[1]
            if "ready:" in line:
                return
        raise RuntimeError(f"the server ended with {self._process.wait()}")

    def read(self) -> Counter[str]:
        assert self._process.stdin is not None  # noqa: S101 - pipes were asked for
        assert self._process.stdout is not None  # noqa: S101
        print(file=self._process.stdin, flush=True)
        return Counter(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()


async def _stream(stub: GenerationServiceStub, new_tokens: int, decodes: asyncio.Event) -> None:
    request = pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=random.choices(range(1000, 40_000), k=PROMPT_TOKENS)),  # noqa: S311 - not a secret
        stop=pb.StopConfig(max_tokens=new_tokens, ignore_eos=True),
    )
    async for event in stub.GenerateStream(request):
        if event.WhichOneof("event") == "delta":
            decodes.set()


async def measure(server: Server, streams: int) -> dict[str, float]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        decoding = [asyncio.Event() for _ in range(streams)]
        stub, tokens = GenerationServiceStub(channel), NEW_TOKENS[streams]
        calls = [asyncio.create_task(_stream(stub, tokens, event)) for event in decoding]
        await asyncio.gather(*(event.wait() for event in decoding))
        before = server.read()
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        spent = server.read()
        await asyncio.gather(*calls)
    spent.subtract(before)
    inside = spent["attention"] + spent["linear layers"]
    parts = {part: spent[part] for part in ("attention", "linear layers", "sampling")}
    parts["rest of the network"] = spent["network"] - inside
    parts["Python"] = spent["wall"] - spent["network"] - spent["sampling"]
    parts["gRPC beside it"] = spent["gRPC"]
    shares = {part: nanoseconds / spent["wall"] for part, nanoseconds in parts.items()}
    return {"step_ms": spent["wall"] / spent["network calls"] / 1e6, **shares}


def measure_until(deadline: float, server: Server, streams: Sequence[int]) -> list[dict[int, dict[str, float]]]:
    """Rounds: at least one; another only if it will be over by then, should it take as long as the longest."""
    rounds: list[dict[int, dict[str, float]]] = []
    longest = 0.0
    while not rounds or time.monotonic() + longest <= deadline:
        begun = time.monotonic()
        rounds.append({n: asyncio.run(measure(server, n)) for n in streams})
        longest = max(longest, time.monotonic() - begun)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="for all rounds together with the server's start")
    parser.add_argument("--streams", type=int, nargs="+", choices=NEW_TOKENS, default=list(NEW_TOKENS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    let_idle_threads_sleep()
    if options.serve:
        serve_and_count()
        return
    deadline = time.monotonic() + options.seconds
    server = Server()
    try:
        rounds = measure_until(deadline, server, options.streams)
    finally:
        server.close()
    result = {n: {key: statistics.median(r[n][key] for r in rounds) for key in rounds[0][n]} for n in options.streams}
    for n, medians in result.items():
        line = "  ".join(f"{part} {share:6.1%}" for part, share in medians.items() if part != "step_ms")
        print(f"{n:2} streams  {medians['step_ms']:6.2f} ms  {line}", flush=True)  # noqa: T201 - a benchmark's output
    document = {"read_bytes_per_second": read_bandwidth(), "rounds": len(rounds), "streams": result}
    save("step_share", document, options.out)


if __name__ == "__main__":
    main()
