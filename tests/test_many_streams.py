"""Many streams of a real server at once: each is as if alone, and whoever dies leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub
from tests.support.client import Answer, gather
from tests.support.process import ServerProcess
from tests.support.waiting import WAIT, wait_until

Serve = Callable[..., ServerProcess]
ONE_THREAD = ("--threads", "1")  # where other work runs beside it, threads that wait for each other are slow


def stop(max_tokens: int, **fields: Any) -> pb.StopConfig:
    return pb.StopConfig(max_tokens=max_tokens, **fields)


@pytest.mark.slow
def test_killed_clients_leave_nothing_behind_and_disturb_nobody(serve: Serve, tiny_model_path: Path) -> None:
    """200 connections of 8 processes, killed at random points of their streams, beside four that go on.

    Sums in a batch of another size may differ in the last bits, so the four are prompts whose every greedy choice is
    clear: by a thousandth at least, where the last bits were seen to move log-probabilities by 2e-5.
    """
    server = serve(tiny_model_path, *ONE_THREAD, "--max-running", "256", "--page-size", "16")
    client = server.connect()

    def ask(number: int) -> Answer:
        output = pb.OutputConfig(token_ids=True, logprobs=2)
        return client.stream(text=f"survivor {number}", stop=stop(100, ignore_eos=True), output=output)

    def is_clear(answer: Answer) -> bool:
        return all(chosen.top[0].logprob - chosen.top[1].logprob > 1e-3 for chosen in answer.logprobs)

    answers = {number: ask(number) for number in range(20)}
    alone = {number: answer.token_ids for number, answer in answers.items() if is_clear(answer)}
    survivors = list(alone)[:4]
    assert len(survivors) == 4
    server.wait_until_idle()
    files, tasks = server.resources()
    over = threading.Event()

    def survive(number: int) -> int:
        rounds = 0
        while not over.is_set():
            assert ask(number).token_ids == alone[number]
            rounds += 1
        return rounds

    rng = random.Random(5)
    with ThreadPoolExecutor(12) as threads:
        surviving = [threads.submit(survive, number) for number in survivors]
        try:
            list(threads.map(lambda events: kill_a_client(server, events), [rng.randint(0, 30) for _ in range(8)]))
        finally:
            over.set()
        assert all(survivor.result(WAIT) > 0 for survivor in surviving)
    server.wait_until_idle()
    assert server.metric("requests_finished_total", reason="cancelled") == 200
    assert all(ask(number).token_ids == alone[number] for number in survivors)
    wait_until(lambda: server.resources()[0] <= files, f"files are closed: {server.resources()}, {files} before")
    assert server.resources()[1] <= tasks + 8  # gRPC keeps a few threads more or less, whatever happened
    assert server.process.poll() is None
    client.close()


def kill_a_client(server: ServerProcess, events: int) -> None:
    script = Path(__file__).parent / "support" / "victims.py"
    victim = subprocess.Popen([sys.executable, script, server.address, "25", str(events)], stdout=subprocess.PIPE)
    assert victim.stdout is not None
    try:
        assert victim.stdout.readline() == b"ready to die\n"
    finally:
        victim.kill()
        victim.wait(WAIT)
        victim.stdout.close()


@pytest.mark.slow
def test_sixteen_streams_of_the_default_model_are_each_as_if_alone(serve: Serve, default_model_path: Path) -> None:
    server = serve(default_model_path, *ONE_THREAD)
    subjects = ("rain", "bees", "Rome", "chess", "salt", "Mars", "tea", "jazz", "glass", "owls", "paper", "gold")
    subjects += ("trains", "wolves", "bread", "ice")
    questions = [f"Tell me {'again and ' * length}again about {what}." for length, what in enumerate(subjects)]
    requests = [
        pb.GenerateStreamRequest(
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=question)]),
            stop=stop(20),
            output=pb.OutputConfig(token_ids=True, logprobs=0),
        )
        for question in questions
    ]

    async def ask(stub: GenerationServiceStub, request: pb.GenerateStreamRequest) -> Answer:
        return gather([event async for event in stub.GenerateStream(request, timeout=600)])

    async def scenario() -> tuple[list[Answer], list[Answer]]:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = GenerationServiceStub(channel)
            alone = [await ask(stub, request) for request in requests]
            return alone, await asyncio.gather(*(ask(stub, request) for request in requests))

    alone, together = asyncio.run(scenario())
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in alone}) > 12, "the questions are too alike to tell answers apart"
    assert server.metric("decode_step_tokens_total") > 0
    server.wait_until_idle()
