"""The Shepherd Model Gateway in front of two servers, driven by the openai package: all as published."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import gateway as shipped
import pytest
import stack

from pagestream.v1 import generation_pb2 as pb
from tests.support.process import ServerProcess
from tests.support.waiting import WAIT, wait_until

pytestmark = pytest.mark.slow

CLIENT = Path(__file__).parent / "openai_client.py"
MODEL = "tiny"
STARTING = 2  # chats that a worker may have been given between the count of its streams and its end
Tool = Callable[[str], str]


@dataclass
class Gateway:
    url: str
    python: str  # one that has the openai package
    workers: list[ServerProcess]

    def start_chat(self, prompt: str, max_tokens: int, *leave_after: int) -> subprocess.Popen[str]:
        command = [self.python, str(CLIENT), f"{self.url}/v1", MODEL, prompt, str(max_tokens), *map(str, leave_after)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def chat(self, prompt: str, max_tokens: int, *leave_after: int) -> str:
        output, errors = self.start_chat(prompt, max_tokens, *leave_after).communicate(timeout=WAIT)
        assert output, errors
        return "".join(json.loads(line)["text"] for line in output.splitlines())

    def total(self, metric: str) -> float:
        return sum(worker.metric(metric) for worker in self.workers)


@pytest.fixture(scope="module")
def gateway(
    tool: Tool, serve: Callable[..., ServerProcess], tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    smg = tool("smg")
    workers = [serve(tiny_model_path, "--threads", "1") for _ in range(2)]
    port, metrics_port = shipped.free_ports(2)
    url, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("smg") / "log"
    command = shipped.smg_command(smg, port, metrics_port, [worker.address for worker in workers])
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        assert shipped.wait_for_workers(url, process, len(workers)) == MODEL
        yield Gateway(url, str(Path(smg).parent / "python"), workers)
    finally:
        process.kill()
        process.wait()


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


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shipped, "TOOLS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(stack.StackError, match="pip install smg"):
        shipped.find_smg()


def test_one_command_starts_it_and_a_signal_stops_it(tool: Tool, tiny_model_path: Path) -> None:
    tool("smg")
    (port,) = shipped.free_ports(1)
    command = [sys.executable, shipped.__file__, str(tiny_model_path), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            said = list(itertools.takewhile(lambda line: not line.startswith("Ctrl-C"), process.stdout))
            assert any(line.startswith("OpenAI API") and f":{port}/v1" in line for line in said), said
            assert shipped.models(f"http://127.0.0.1:{port}") == [MODEL, MODEL]
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        finally:
            process.terminate()
        assert process.wait(WAIT) == 0
    assert len(children) == 3
    assert not any(Path("/proc", child).exists() for child in children)


@dataclass
class Load:
    answered: int = 0
    failed: list[str] = field(default_factory=list)


@contextmanager
def load_on(gateway: Gateway) -> Iterator[Load]:
    """Three clients that chat one chat after another until the block is left.

    Their chats begin unlike each other: smg sends what begins alike to the worker that has it cached, and three
    clients are too few for it to think that worker overloaded, so one that came back might never be given a chat.
    """
    load, enough = Load(), threading.Event()

    def chats() -> None:
        while not enough.is_set():
            messages = [{"role": "user", "content": f"{uuid.uuid4()}: what is this?"}]
            body = json.dumps({"model": MODEL, "messages": messages, "max_tokens": 20, "stream": True}).encode()
            request = urllib.request.Request(  # noqa: S310 - our own gateway
                f"{gateway.url}/v1/chat/completions", body, {"content-type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=WAIT) as response:  # noqa: S310
                    text = response.read().decode()
            except OSError as error:
                load.failed.append(str(error))
            else:
                if '"finish_reason":"' in text and text.endswith("data: [DONE]\n\n"):
                    load.answered += 1
                else:
                    load.failed.append(text)

    threads = [threading.Thread(target=chats) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        enough.set()
        for thread in threads:
            thread.join(WAIT)


def test_a_rolling_restart_under_load_loses_nothing(
    gateway: Gateway,
    serve: Callable[..., ServerProcess],
    tiny_model_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """A call that is refused as draining is tried again elsewhere by smg; answers that run end within the grace."""
    with load_on(gateway) as load:
        for index, old in enumerate(gateway.workers):
            wait_until(lambda old=old: old.metric("running_requests") > 0, "it answers chats")
            before = load.answered
            old.terminate()
            assert old.wait_for_exit() == 0
            port = old.address.rpartition(":")[2]
            new = gateway.workers[index] = serve(tiny_model_path, "--threads", "1", "--grpc-port", port)
            wait_until(lambda new=new: new.metric("requests_finished_total") > 0, "smg comes back to it")
            assert load.answered > before
    record_property("chats answered through smg while both workers restarted", load.answered)
    assert load.failed == []


def test_a_killed_worker_takes_only_its_own_streams_along(gateway: Gateway) -> None:
    """Last: one worker is gone after it."""
    chats = [gateway.start_chat(f"story {number}", 3900) for number in range(6)]
    wait_until(lambda: gateway.total("running_requests") >= 2, "some are being answered")
    running = [int(worker.metric("running_requests")) for worker in gateway.workers]
    victim = int(running[0] < running[1])
    gateway.workers[victim].stop()
    finished = 0
    for chat in chats:
        output, _ = chat.communicate(timeout=2 * WAIT)
        lines = [json.loads(line) for line in output.splitlines()]
        finished += bool(lines) and lines[-1]["finish"] is not None
    assert 6 - running[victim] - STARTING <= finished < 6
    assert gateway.chat("and who is left?", 4)
