"""What `make bench` reports follows from what was measured: goals, ratios, late arrivals, failures, pauses."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peers.clients import LlamaCppClient, StreamingClient
from peers.fleet import Fleet
from peers.jobs import FailedError, Job, Stream, checked
from peers.report import row
from peers.scenarios import SCENARIOS, Goal, Metric, prompts
from peers.targets import OURS, WORKERS, Capacity, Target, _pipe

MORE = Metric("speed", "tokens/s", Goal(1.3, 2.0), more_is_better=True)
LESS = Metric("time", "s", Goal(0.8, 0.6))
positive = st.floats(0.01, 1e6)


@given(ours=positive, first=positive, second=positive)
def test_the_ratio_is_to_the_best_peer_in_either_direction(ours: float, first: float, second: float) -> None:
    values = {OURS: [ours], "first": [first], "second": [second]}
    assert row(MORE, values).ratio == pytest.approx(min(ours / first, ours / second))
    assert row(LESS, values).ratio == pytest.approx(max(ours / first, ours / second))


@pytest.mark.parametrize(
    ("metric", "ours", "verdict"),
    [(MORE, 1.0, "missed"), (MORE, 1.4, "first"), (MORE, 2.0, "aim"), (LESS, 0.9, "missed"), (LESS, 0.5, "aim")],
)
def test_the_verdict_names_the_goal_that_is_met(metric: Metric, ours: float, verdict: str) -> None:
    assert row(metric, {OURS: [ours], "peer": [1.0]}).verdict == verdict


def test_absolute_goals_need_no_peer_and_ratios_do() -> None:
    absolute = Metric("memory", "MB", Goal(500.0, 350.0, absolute=True))
    assert row(absolute, {OURS: [400.0]}).verdict == "first"
    assert row(LESS, {OURS: [0.1]}).verdict == ""
    assert row(LESS, {"peer": [0.1]}).ratio is None


def test_a_stream_counts_from_its_arrival_and_gaps_from_the_run() -> None:
    (stream,) = checked([Job([1], 4, at=10.0)], [[11.0, 12.0, 12.5, 14.0]])
    assert stream == Stream([1.0, 2.0, 2.5, 4.0], 10.0)
    assert (stream.time_to_first_token, stream.tokens_per_second, stream.end) == (1.0, 1.0, 14.0)
    assert stream.gaps(12.2, 13.9) == [0.5]


def test_too_few_tokens_are_a_failure_but_for_what_was_to_be_cut_off() -> None:
    with pytest.raises(FailedError, match="1 tokens came for a prompt of 2, not 3"):
        checked([Job([1, 2], 3)], [[0.1]])
    checked([Job([1, 2], 3, background=True)], [[0.1]])


class _Endless(StreamingClient):
    """Makes a token each time the loop comes round."""

    def __init__(self) -> None:
        self.ended = 0

    async def tokens(self, job: Job) -> AsyncGenerator[int, None]:
        try:
            for _ in range(job.new_tokens):
                await asyncio.sleep(0)
                yield 1
        finally:
            self.ended += 1


def test_background_jobs_run_until_the_others_are_done() -> None:
    client = _Endless()
    background, later = asyncio.run(client.run([Job([1], 10**9, background=True), Job([1], 3, at=0.02)]))
    assert client.ended == 2
    assert len(later.tokens) == 3
    assert later.time_to_first_token >= 0
    assert len(background.tokens) > 3


def test_tokens_that_llama_cpp_holds_back_are_counted_at_the_end() -> None:
    client = LlamaCppClient(0)
    assert client.count({"tokens": [5, 6]}, 0) == 2
    assert client.count({"tokens": [], "stop": True, "tokens_predicted": 4}, 2) == 2


def test_prompts_are_the_same_for_everyone_and_never_come_twice() -> None:
    ours, theirs = prompts("0 mixed 1"), prompts("0 mixed 1")
    drawn = [ours(64) for _ in range(3)]
    assert drawn == [theirs(64) for _ in range(3)]
    assert len({prompt[0] for prompt in drawn}) == 3


def test_every_prompt_and_its_answer_fit_what_the_scenario_asks_for() -> None:
    """The largest request of each is known from its name."""
    for context in (128, 512, 2048, 4096, 8000):
        assert SCENARIOS[f"stream-{context}"].capacity.context >= context + 64
    assert SCENARIOS["mixed"].capacity.context >= 2048 + 64


_WORKER = f"""
import sys
sys.path.insert(0, {str(WORKERS)!r})
from protocol import must_be_one_static_batch, serve
def run(jobs):
    must_be_one_static_batch(jobs)
    return [[0.5] * jobs[0]["new_tokens"]] * len(jobs)
serve(run)
"""


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _target(name: str, program: str) -> Target:
    return Target(name, (), lambda _: [sys.executable, "-c", program], _pipe, worker=True)


def test_only_the_target_that_is_measured_runs_and_failures_say_why(tmp_path: Path) -> None:
    async def scene() -> None:
        fleet = Fleet(tmp_path, lambda: [1, 2])
        first, second = _target("first", _WORKER), _target("second", _WORKER)
        capacity = Capacity(1, 64)
        try:
            async with fleet.use(first, capacity, fresh=False) as one:
                pids = one.process._tree()
                (stream,) = await one.client.run([Job([3], 5)])
                assert stream.tokens == [0.5] * 5
            async with fleet.use(second, capacity, fresh=False):
                assert [_state(pid) for pid in pids] == ["T"] * len(pids)
            async with fleet.use(first, capacity, fresh=False) as again:
                assert again is one
            with pytest.raises(FailedError, match="one static batch"):
                async with fleet.use(first, capacity, fresh=False) as again:
                    await again.client.run([Job([1], 1), Job([1, 2], 1)])
            assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # what failed is not trusted again
            broken = _target("broken", "import sys; print('no such model', file=sys.stderr); sys.exit(3)")
            with pytest.raises(FailedError, match="it ended with 3: no such model"):
                async with fleet.use(broken, capacity, fresh=False):
                    pass
        finally:
            await fleet.end()

    asyncio.run(scene())
