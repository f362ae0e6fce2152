"""The Shepherd Model Gateway in front of two servers, driven by the openai package: all as published."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from pagestream.v1 import generation_pb2 as pb
from tests.support.process import ServerProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

CLIENT = Path(__file__).parent / "openai_client.py"
MODEL = "tiny"
START = 60.0
STARTING = 2  # chats that a worker may have been given between the count of its streams and its end
Tool = Callable[[str], str]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Gateway:
    url: str
    python: str  # one that has the openai package
    workers: list[ServerProcess]

    def start_chat(self, prompt: str, max_tokens: int, *leave_after: int) -> subprocess.Popen[str]:
        command = [self.python, str(CLIENT), f"{self.url}/v1", MODEL, prompt, str(max_tokens), *map(str, leave_after)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def chat(self, prompt: str, max_tokens: int, *leave_after: int) -> str:
        output, errors = self.start_chat(prompt, max_tokens, *leave_after).communicate(timeout=60)
        assert output, errors
        return "".join(json.loads(line)["text"] for line in output.splitlines())

    def total(self, metric: str) -> float:
        return sum(worker.metric(metric) for worker in self.workers)


@pytest.fixture(scope="module")
def gateway(
    tool: Tool, serve: Callable[..., ServerProcess], tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    smg = tool("smg")
    workers = [serve(tiny_model_path, "--threads", "1", "--canary-interval", "0") for _ in range(2)]
    port, log = free_port(), (tmp_path_factory.mktemp("smg") / "log").open("w")
    command = [smg, "launch", "--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    command += ["--worker-urls", *(f"grpc://{worker.address}" for worker in workers)]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"

    def knows_both() -> bool:
        assert process.poll() is None, Path(log.name).read_text()
        try:
            with urllib.request.urlopen(f"{url}/workers", timeout=5) as response:  # noqa: S310 - our own gateway
                listed = json.load(response)["workers"]
        except OSError:
            return False
        return len(listed) == 2 and all(worker["model_id"] == MODEL for worker in listed)

    try:
        wait_until(knows_both, "the gateway knows both workers and their model", START)
        yield Gateway(url, str(Path(smg).parent / "python"), workers)
    finally:
        process.kill()
        process.wait()
        log.close()


def test_a_streamed_chat_is_our_own_answer(gateway: Gateway) -> None:
    prompt = "naïve café 🎉, and then?"
    with closing(gateway.workers[0].connect()) as client:
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=prompt)])
        ours = client.stream(chat=chat, stop=pb.StopConfig(max_tokens=40))
    assert gateway.chat(prompt, 40) == ours.text
    assert ours.text


def test_a_client_that_leaves_frees_its_blocks(gateway: Gateway) -> None:
    gateway.chat("a long story", 3000, 5)
    for worker in gateway.workers:
        worker.wait_until_idle()
    assert gateway.total("requests_finished_total") > 0


def test_prompts_that_begin_alike_go_where_they_are_cached(gateway: Gateway) -> None:
    """Three turns for each of six beginnings: two of three find it. By turns, between two workers, one would."""
    asked, found = (gateway.total(f"prefix_cache_{what}_tokens_total") for what in ("queried", "hit"))
    for topic in range(6):
        for turn in range(3):
            gateway.chat(f"topic {topic}: " + f"the {topic} quick brown foxes jump. " * 20 + f"turn {turn}", 4)
    asked, found = (
        gateway.total(f"prefix_cache_{what}_tokens_total") - before
        for what, before in (("queried", asked), ("hit", found))
    )
    assert found / asked > 0.55


def test_a_killed_worker_takes_only_its_own_streams_along(gateway: Gateway) -> None:
    """Last: one worker is gone after it."""
    chats = [gateway.start_chat(f"story {number}", 3900) for number in range(6)]
    wait_until(lambda: gateway.total("running_requests") >= 2, "some are being answered")
    running = [int(worker.metric("running_requests")) for worker in gateway.workers]
    victim = int(running[0] < running[1])
    gateway.workers[victim].stop()
    finished = 0
    for chat in chats:
        output, _ = chat.communicate(timeout=120)
        lines = [json.loads(line) for line in output.splitlines()]
        finished += bool(lines) and lines[-1]["finish"] is not None
    assert 6 - running[victim] - STARTING <= finished < 6
    assert gateway.chat("and who is left?", 4)
