"""Random clients against a running server for minutes: what they leave behind, and what readers that stop cost others.

`make soak` runs it for ten minutes on a tiny model and prints one JSON document; tests/test_soak.py for seconds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pagestream.v1 import generation_pb2 as pb
from tests.support.client import Client, gather, refusal_of
from tests.support.process import ServerProcess
from tests.support.waiting import wait_until

WORKERS, READERS = 12, 50
SERVER = ("--threads", "1", "--page-size", "16", "--kv-memory", str(32_768 * 2048), "--token-budget", "128")
SERVER += ("--max-queue-requests", "32", "--slow-reader-seconds", "3", "--drain-seconds", "5")

_SMALL_WINDOW = (
    ("grpc.http2.bdp_probe", 0),
)  # 64 KiB that may wait unread; else gRPC lets a connection have megabytes

# Kind of event -> ways it may end. A deadline or a departure may come after the answer, and any call may find the
# queue full.
ALLOWED = {
    "finish": {"ok", "QUEUE_FULL"},
    "generate": {"ok", "QUEUE_FULL"},
    "cancel": {"left", "QUEUE_FULL"},
    "disconnect": {"left", "QUEUE_FULL"},
    "slow": {"left", "QUEUE_FULL"},
    "deadline": {"ok", "DEADLINE_EXCEEDED", "QUEUE_FULL"},
    "queue_timeout": {"ok", "QUEUE_TIMEOUT", "QUEUE_FULL"},
    "duplicate": {"DUPLICATE_REQUEST_ID", "QUEUE_FULL"},
    "oversize": {"PROMPT_EXCEEDS_MODEL_CONTEXT", "QUEUE_FULL"},
    "invalid": {"INVALID_FIELD", "QUEUE_FULL"},
}


class Storm:
    """Clients that each do one random thing after another; counts what came of it."""

    def __init__(self, address: str, seed: int) -> None:
        self._address = address
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self.outcomes: Counter[tuple[str, str]] = Counter()

    def run(self, events: int, seconds: float) -> None:
        """Until so many have happened or so long has passed. Raises AssertionError at an outcome nobody may see."""
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(WORKERS) as threads:
            for worker in [threads.submit(self._work, events, until, number) for number in range(WORKERS)]:
                worker.result()

    def _work(self, events: int, until: float, number: int) -> None:
        client = Client(self._address)
        chance = random.Random(self._chance.random() + number)
        while time.monotonic() < until and self.outcomes.total() < events:
            kind = chance.choice(tuple(ALLOWED))
            outcome = self._outcome(kind, client, chance)
            assert outcome in ALLOWED[kind], f"{kind} ended as {outcome}"
            with self._lock:
                self.outcomes[kind, outcome] += 1
        client.close()

    def _outcome(self, kind: str, client: Client, chance: random.Random) -> str:
        try:
            return self._do(kind, client, chance)
        except grpc.RpcError as error:
            if kind == "deadline" and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return "DEADLINE_EXCEEDED"  # perhaps in the client's own words, with the server's details
            refusal = refusal_of(error)
            return refusal.reason if refusal.reason not in (None, "DEADLINE") else refusal.code.name

    def _do(self, kind: str, client: Client, chance: random.Random) -> str:
        fields = _request(chance)
        timeout = 60.0
        match kind:
            case "generate":
                client.generate(timeout, **fields)
                return "ok"
            case "cancel" | "disconnect" | "slow":
                return self._leave(kind, client, chance, fields)
            case "duplicate":
                return self._send_twice(client, fields)
            case "deadline":
                timeout = chance.choice((0.001, 0.02, 0.1, 0.5))
            case "queue_timeout":
                fields["queue_timeout"] = Duration(nanos=chance.choice((1_000_000, 50_000_000)))
            case "oversize":
                fields["text"] = "The quick brown fox. " * 4000
            case "invalid":
                fields["sampling"] = pb.SamplingConfig(top_p=7)
        gather(client.open(timeout, tenant=chance.choice("abc"), **fields))
        return "ok"

    def _leave(self, kind: str, client: Client, chance: random.Random, fields: dict[str, Any]) -> str:
        fields["stop"] = pb.StopConfig(max_tokens=1000, ignore_eos=True)
        own = Client(self._address) if kind == "disconnect" else client
        call = own.open(60.0, **fields)
        next(call)  # accepted
        list(islice(call, chance.randint(0, 20)))
        if kind == "slow":
            time.sleep(chance.choice((0.1, 1.0)))
        if kind == "disconnect":
            own.close()
        else:
            call.cancel()
        return "left"

    def _send_twice(self, client: Client, fields: dict[str, Any]) -> str:
        fields["stop"] = pb.StopConfig(max_tokens=1000, ignore_eos=True)
        first = client.open(60.0, request_id=(name := f"twice {time.monotonic_ns()} {id(fields)}"), **fields)
        next(first)
        try:
            gather(client.open(60.0, request_id=name, **fields))
        finally:
            first.cancel()
        return "ok"


def _request(chance: random.Random) -> dict[str, Any]:
    return {
        "text": "The quick brown fox " * int(2 ** chance.uniform(0, 6)),
        "stop": pb.StopConfig(max_tokens=chance.randint(1, 60), ignore_eos=chance.random() < 0.5),
        "priority": chance.choice((pb.PRIORITY_UNSPECIFIED, pb.PRIORITY_LOW, pb.PRIORITY_HIGH)),
        "output": pb.OutputConfig(logprobs=5) if chance.random() < 0.2 else None,
    }


def stop_reading(server: ServerProcess, rounds: int, seconds: float) -> dict[str, Any]:
    """The gaps of one stream alone and beside 50 clients that opened a stream and read nothing of it, in turns; and the
    server's memory before them, beside them and after. Log-probabilities make each token fill the connection sooner.
    """
    gaps: dict[str, list[float]] = {"alone": [], "beside": []}
    memory = [server.resident_bytes()]
    peaks = []
    for _ in range(rounds):
        gaps["alone"] += _gaps(server, seconds)
        before = _ended_as_slow(server)
        clients = [Client(server.address, *_SMALL_WINDOW) for _ in range(READERS)]
        endless = {"text": "x", "stop": pb.StopConfig(ignore_eos=True), "output": pb.OutputConfig(logprobs=20)}
        calls = []
        for client in clients:
            calls.append(client.open(300.0, **endless))
            next(calls[-1])

        def all_out(before: float = before) -> bool:
            return server.metric("streams_paused") + _ended_as_slow(server) - before == READERS

        wait_until(all_out, "none of them runs", 120)
        gaps["beside"] += _gaps(server, seconds)
        peaks.append(server.resident_bytes())
        for client in clients:
            client.close()
        server.wait_until_idle()
        memory.append(server.resident_bytes())
    medians = {name: statistics.median(values) * 1e3 for name, values in gaps.items()}
    return {
        "readers": READERS,
        "gap_ms_median": medians,
        "gap_ms_p99": {name: sorted(values)[int(0.99 * len(values))] * 1e3 for name, values in gaps.items()},
        "gap_ratio": medians["beside"] / medians["alone"],
        "gaps": {name: len(values) for name, values in gaps.items()},
        "resident_mb": {"before_and_after_each_round": _megabytes(memory), "beside": _megabytes(peaks)},
    }


def _gaps(server: ServerProcess, seconds: float) -> list[float]:
    client = server.connect()
    call = client.open(60.0, text="The lazy dog", stop=pb.StopConfig(ignore_eos=True))
    times = []
    until = time.perf_counter() + seconds
    for event in call:
        times.append(time.perf_counter())
        if times[-1] > until:
            break
        assert event.WhichOneof("event") != "finished", "the answer was too short"
    call.cancel()
    client.close()
    return [later - earlier for earlier, later in pairwise(times[2:])]  # those of the answer's tokens


def _ended_as_slow(server: ServerProcess) -> float:
    return server.metric("requests_finished_total", reason="slow_reader")


def _megabytes(sizes: list[int]) -> list[float]:
    return [round(size / 2**20, 1) for size in sizes]


def _release_p99(server: ServerProcess) -> dict[str, Any]:
    """For each cause, the upper edge of the bucket in which the 99th percentile of the time to free blocks lies."""
    edges = ("0.001", "0.0025", "0.005", "0.01", "0.02", "0.04", "0.08", "0.16", "0.32", "0.64", "1.28", "+Inf")
    name, result = "cancel_release_seconds", {}
    for cause in ("client", "deadline", "slow_reader"):
        count = server.metric(f"{name}_count", by=cause)
        within = (edge for edge in edges if server.metric(f"{name}_bucket", by=cause, le=edge) >= 0.99 * count)
        result[cause] = {"count": count, "p99_at_most_s": next(within) if count else None}
    return result


def soak(server: ServerProcess, *, events: int, seconds: float, rounds: int, seed: int = 1) -> dict[str, Any]:
    """Raises AssertionError if the server ends, leaks, or answers as it must not."""
    Storm(server.address, seed).run(10 * WORKERS, seconds)  # every thread and buffer there will be
    server.wait_until_idle()
    files, threads = server.resources()
    memory = server.resident_bytes()
    storm = Storm(server.address, seed + 1)
    started = time.monotonic()
    storm.run(events, seconds)
    elapsed = time.monotonic() - started
    server.wait_until_idle()
    settled: Callable[[], bool] = lambda: server.resources()[0] <= files and server.resources()[1] <= threads + 8  # noqa: E731
    wait_until(settled, f"files and threads are as before: {files}, {threads}")
    after = server.resources()
    result = {
        "events": storm.outcomes.total(),
        "seconds": round(elapsed, 1),
        "outcomes": {f"{kind}: {outcome}": count for (kind, outcome), count in sorted(storm.outcomes.items())},
        "leaked_blocks": server.metric("kv_leaked_blocks"),
        "files": [files, after[0]],
        "threads": [threads, after[1]],
        "resident_mb": _megabytes([memory, server.resident_bytes()]),
        "preemptions": server.metric("preemptions_total"),
        "release": _release_p99(server),
    }
    result["readers_that_stop"] = stop_reading(server, rounds, min(seconds / 20, 4.0)) if rounds else None
    with ThreadPoolExecutor(1) as thread:  # the end of it, under load
        dying = thread.submit(_last_storm, server)
        wait_until(lambda: server.metric("running_requests") > 0, "something runs")
        server.terminate()
        result["exit_code"] = server.wait_for_exit(30)
        dying.result()
    return result


def _last_storm(server: ServerProcess) -> None:
    """Streams that the end of the server ends."""
    client = server.connect()
    calls = [client.open(60.0, text="x", stop=pb.StopConfig(ignore_eos=True)) for _ in range(8)]
    for call in calls:
        with pytest.raises(grpc.RpcError) as error:
            gather(call)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=520.0, help="of random events, at most")
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=4, help="of readers that stop")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from record import save

    from tests.support.tiny_model import save_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(save_tiny_model(Path(folder) / "tiny"), *SERVER)
        try:
            server.wait_until_ready()
            result = soak(
                server, events=options.events, seconds=options.seconds, rounds=options.rounds, seed=options.seed
            )
        finally:
            server.stop()
    save("soak", result, options.out)


if __name__ == "__main__":
    main()
