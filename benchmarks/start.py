"""From process start to readiness, and the most memory a server ever had resident, with the default model.

Method: `pagestream serve` as a user would start it, the model, the compiled kernels and the packed weights cached by a
start before. Every run measures the time until the health service says SERVING, and beside it the part that no server
on torch can go below: a process that imports torch and nothing else. The peak is VmHWM of the last run's server: once
ready, and after one request of 8,000 prompt tokens. The floor of that is torch's own peak, the weights and the KV
cache of that context. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from record import save

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub

PROMPT_TOKENS = 8000
ONLY_TORCH = "import torch; print(open('/proc/self/status').read(), flush=True)"


@contextlib.contextmanager
def serving() -> Iterator[tuple[subprocess.Popen[str], grpc.Channel]]:
    """A server that is ready."""
    command = [sys.executable, "-m", "pagestream.server", "serve", "--grpc-port", "0", "--http-port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own server
    try:
        lines = (re.search(r"gRPC on (\S+:\d+);", line) for line in server.stderr or ())
        address = next(line[1] for line in lines if line)
        with grpc.insecure_channel(address) as channel:
            states = HealthStub(channel).Watch(HealthCheckRequest())
            next(state for state in states if state.status == HealthCheckResponse.SERVING)
            yield server, channel
    finally:
        server.terminate()
        server.communicate()


def peak_bytes(status: str) -> int:
    """VmHWM in the text of /proc/<pid>/status."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kilobytes) * 1024


def only_torch() -> tuple[float, int]:
    """Seconds from process start until torch is imported, and the peak in bytes then."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", ONLY_TORCH], stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        lines = process.stdout or ()
        first = next(iter(lines))
        seconds = time.perf_counter() - started
        return seconds, peak_bytes(first + "".join(lines))


def ask(channel: grpc.Channel) -> None:
    generator = random.Random(0)  # noqa: S311 - a fixed workload
    prompt = [generator.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)]
    request = pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=prompt), stop=pb.StopConfig(max_tokens=16, ignore_eos=True)
    )
    for _ in GenerationServiceStub(channel).GenerateStream(request):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    with serving():  # fills the caches
        pass
    to_ready, to_torch, peaks = [], [], {}
    for run in range(arguments.runs):
        seconds, torch_peak = only_torch()
        to_torch.append(seconds)
        started = time.perf_counter()
        with serving() as (server, channel):
            to_ready.append(time.perf_counter() - started)
            print(f"run {run + 1}  ready after {to_ready[-1]:.2f} s", flush=True)  # noqa: T201 - a benchmark's output
            if run + 1 == arguments.runs:
                status = Path(f"/proc/{server.pid}/status")
                peaks = {"torch_alone": torch_peak, "ready": peak_bytes(status.read_text())}
                ask(channel)
                peaks["after_8k"] = peak_bytes(status.read_text())
    result = {
        "seconds_to_ready": to_ready,
        "median_seconds_to_ready": statistics.median(to_ready),
        "median_seconds_to_import_torch": statistics.median(to_torch),
        "prompt_tokens": PROMPT_TOKENS,
        "peak_resident_bytes": peaks,
    }
    save("start", result, arguments.out)


if __name__ == "__main__":
    main()
