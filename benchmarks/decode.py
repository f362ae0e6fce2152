"""Decode speed of one stream, end to end through gRPC, beside transformers' own `generate` in the same run.

Method: the server runs in its own process, as a user would start it, once for each dtype. Every round measures all
contestants once, one after the other, greedy, on the same prompt of 128 random token ids: seconds from the first token
to the last over the tokens between them. For transformers that is the time of 64 tokens less the time of one. Medians
over the rounds, and ratios within this run. The last line is one JSON document.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import torch
import transformers
from record import read_bandwidth, save

from pagestream.model.default_model import resolve_model
from pagestream.server.config import default_cache_dir
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub

PROMPT_TOKENS = 128
NEW_TOKENS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of transformers
OURS = (*DTYPES, "int4")  # the default model's file is in 4- and 8-bit groups: int8 would keep the same

Contestant = Callable[[list[int]], float]  # a prompt -> seconds per token


@contextlib.contextmanager
def pagestream(dtype: str) -> Iterator[Contestant]:
    ports = ["--grpc-port", "0", "--http-port", "0"]
    command = [sys.executable, "-m", "pagestream.server", "serve", "--dtype", dtype, *ports]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own server
    try:
        port = _port_when_ready(server)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield lambda prompt: _stream(GenerationServiceStub(channel), prompt)
    finally:
        server.terminate()
        server.communicate()


def _port_when_ready(server: subprocess.Popen[str]) -> int:
    port = None
    for line in server.stderr or ():
        if match := re.search(r"gRPC on \S+:(\d+)", line):
            port = int(match[1])
        if "ready:" in line and port is not None:
            return port
    raise RuntimeError(f"the server ended with {server.wait()}")


def _stream(stub: GenerationServiceStub, prompt: list[int]) -> float:
    request = pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=prompt),
        stop=pb.StopConfig(max_tokens=NEW_TOKENS, ignore_eos=True),
        output=pb.OutputConfig(token_ids=True),
    )
    stamps: list[float] = []
    for event in stub.GenerateStream(request):
        stamps.extend([time.perf_counter()] * len(event.delta.token_ids))
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def hugging_face(path: Path, dtype: str) -> Contestant:
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(path.parent, gguf_file=path.name, dtype=torch.float32).to(DTYPES[dtype])

    def seconds(prompt: list[int], tokens: int) -> float:
        started = time.perf_counter()
        model.generate(torch.tensor([prompt]), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - started

    return lambda prompt: (seconds(prompt, NEW_TOKENS) - seconds(prompt, 1)) / (NEW_TOKENS - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    path = resolve_model("default", default_cache_dir())
    generator = random.Random(0)  # noqa: S311 - a fixed workload
    bandwidth = read_bandwidth()
    print(f"reads stream at {bandwidth / 1e9:.1f} GB/s", flush=True)  # noqa: T201 - a benchmark's output
    with contextlib.ExitStack() as stack:
        contestants = {f"transformers {dtype}": hugging_face(path, dtype) for dtype in DTYPES}
        contestants |= {f"pagestream {dtype}": stack.enter_context(pagestream(dtype)) for dtype in OURS}
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for round_number in range(arguments.rounds + 1):  # the first warms up
            prompt = [generator.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)]
            for name, run in contestants.items():
                took = run(prompt)
                if round_number > 0:
                    seconds[name].append(took)
                    print(f"round {round_number}  {name:18} {1 / took:6.1f} tokens/s", flush=True)  # noqa: T201
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best_peer = min(medians[f"transformers {dtype}"] for dtype in DTYPES)
    result = {
        "read_bytes_per_second": bandwidth,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "seconds_per_token": seconds,
        "median_tokens_per_second": {name: 1 / median for name, median in medians.items()},
        "time_over_best_transformers": {dtype: medians[f"pagestream {dtype}"] / best_peer for dtype in OURS},
    }
    save("decode", result, arguments.out)


if __name__ == "__main__":
    main()
