"""Forecasts of first tokens, queues and stalls, against an engine on a machine whose cost is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pagestream.model.step import StepPlan
from pagestream.server.events import Finished
from pagestream.server.forecast import Estimate
from pagestream.server.metrics import Metrics
from tests.support.fakes import FakeClock, Rig, make_scored
from tests.support.waiting import WAIT

STEP, ROW, CONTEXT, TOKEN, SQUARE, TARGET = 0.008, 0.0005, 1e-6, 4e-4, 3e-8, 0.06
SCORED = 0.004  # beside that, of each row with a given token but one


def text(seed: int, length: int) -> str:
    """Nobody else's, so that nothing is cached."""
    return "".join(random.Random(seed).choices("abcdefgh", k=length))


class Machine:
    """An engine that has learned what steps cost on it."""

    def __init__(self, metrics: Metrics, clock: FakeClock, **settings: Any) -> None:
        self.rig = Rig(metrics, num_blocks=4000, token_budget=512, clock=clock, target_gap=TARGET, **settings)
        self._clock = clock
        self.rig.runner.on_step = self._step
        for seed in range(8):
            self.rig.submit(f"warm-up {seed}", prompt=text(seed, 1500 * (seed + 1)), max_new_tokens=30 * seed + 1)
            self.rig.recorder.end_of(f"warm-up {seed}")
        self.rig.runner.hold()

    def _step(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            if chunk.is_decode:
                self._clock.now += ROW + CONTEXT * chunk.end
            else:
                self._clock.now += TOKEN * chunk.length + SQUARE * (chunk.end**2 - chunk.start**2)
                self._clock.now += SCORED * max(len(chunk.sampled_positions) - 1, 0)
        self._clock.now += STEP

    def steps(self, count: int) -> None:
        self.rig.runner.allow(count)
        self.rig.runner.wait_until_held()

    def estimate(self, prompt: str) -> Estimate:
        """Between two steps, as a prompt that arrives then would find it."""
        answer = self.rig.engine.estimate(list(prompt.encode()), "")
        self.rig.runner.allow(1)
        return answer.result(WAIT)

    def first_token_of(self, prompt: str) -> float:
        self.rig.submit("asked", prompt=prompt, max_new_tokens=4)
        self.rig.runner.allow()
        end = self.rig.recorder.end_of("asked")
        assert isinstance(end, Finished)
        predicted = end.timings.predicted_time_to_first_token
        actual = end.timings.time_to_first_token
        assert predicted is not None
        assert actual is not None
        assert predicted == pytest.approx(actual, rel=0.25, abs=0.02)
        return actual


@pytest.fixture
def make_machine(make_metrics: Callable[..., Metrics]) -> Iterator[Callable[..., Machine]]:
    machines: list[Machine] = []

    def make(**settings: Any) -> Machine:
        clock = FakeClock()
        machines.append(Machine(make_metrics(clock), clock, **settings))
        return machines[-1]

    yield make
    for machine in machines:
        machine.rig.close()


@pytest.mark.parametrize("length", [20, 600, 5000])
def test_a_prompt_alone(make_machine: Callable[..., Machine], length: int) -> None:
    machine = make_machine()
    whole = -(-length // 512) * STEP + TOKEN * length + SQUARE * length**2
    assert machine.first_token_of(text(99, length)) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("length", [20, 600, 5000])
@pytest.mark.parametrize("streams", [1, 6])
def test_a_prompt_beside_streams(make_machine: Callable[..., Machine], streams: int, length: int) -> None:
    machine = make_machine()
    for stream in range(streams):
        machine.rig.submit(f"stream {stream}", prompt=text(50 + stream, 100), max_new_tokens=900)
    machine.steps(30)
    machine.first_token_of(text(99, length))


@pytest.mark.parametrize("length", [20, 1000, 6000])
def test_a_prompt_behind_others(make_machine: Callable[..., Machine], length: int) -> None:
    """Shorter ones go first, of longer ones the oldest takes a quarter."""
    machine = make_machine()
    for other, tokens in enumerate((4000, 300, 300, 2500)):
        machine.rig.submit(f"other {other}", prompt=text(60 + other, tokens), max_new_tokens=700)
    machine.steps(1)
    machine.first_token_of(text(99, length))


def test_a_prompt_that_must_wait_for_a_place(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(max_running=2)
    for other in range(3):
        machine.rig.submit(f"other {other}", prompt=text(60 + other, 50), max_new_tokens=40)
    machine.steps(3)
    machine.first_token_of(text(99, 50))


def test_cached_tokens_are_counted_and_not_taken(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    prompt = text(7, 1500 * 8)[:5000]
    held = machine.rig.pool.num_references
    again, new = machine.estimate(prompt), machine.estimate(text(98, 5000))
    assert machine.rig.pool.num_references == held
    assert (again.prompt_tokens, again.cached_tokens) == (5000, 4999)
    assert new.cached_tokens < 16
    assert (again.first_token or 0) < 0.1 * (new.first_token or 0)
    assert machine.first_token_of(prompt) == pytest.approx(again.first_token, rel=0.1)


@pytest.mark.parametrize("before", [[8000], [100, 100, 100]])
def test_who_asks_first_misses_the_step_that_begins_meanwhile(
    make_machine: Callable[..., Machine], before: list[int]
) -> None:
    machine = make_machine()
    for other, tokens in enumerate(before):
        machine.rig.submit(f"other {other}", prompt=text(50 + other, tokens), max_new_tokens=900)
    machine.steps(2)
    prompt = text(99, 20)
    estimate = machine.estimate(prompt)
    machine.rig.runner.hold()
    assert machine.first_token_of(prompt) == pytest.approx(estimate.first_token, rel=0.1)


def test_stalls_of_others_are_those_that_the_ledger_finds(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    for stream in range(3):
        machine.rig.submit(f"stream {stream}", prompt=text(50 + stream, 100), max_new_tokens=900)
    machine.steps(30)
    prompt = text(99, 4000)
    estimate = machine.estimate(prompt)
    machine.rig.runner.hold()
    job = machine.rig.submit("prompt", prompt=prompt, max_new_tokens=1)
    machine.rig.runner.allow()
    machine.rig.recorder.end_of("prompt")
    assert estimate.stall_for_others == pytest.approx(job.ledger.caused, rel=0.15)
    assert estimate.gap_after == pytest.approx(STEP + 4 * ROW + CONTEXT * (3 * 130 + 4000), rel=0.1)
    assert estimate.queue == pytest.approx(STEP + 3 * ROW + CONTEXT * 3 * 130, rel=0.1)  # of the step it misses
    assert not estimate.extrapolated
    assert estimate.samples > 50


def test_whoever_is_refused_is_told_when_the_prompts_that_run_are_read(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    jobs = [machine.rig.submit(f"other {seed}", prompt=text(60 + seed, 2000), max_new_tokens=9) for seed in range(6)]
    machine.steps(2)
    now, told = machine.rig.engine.clock(), machine.rig.engine.inbox.predicted_wait
    machine.rig.runner.allow()
    for job in jobs:
        machine.rig.recorder.end_of(job.request.request_id)
    last = max(job.first_token or 0.0 for job in jobs)
    assert told == pytest.approx(last - now, rel=0.2)


def test_scoring_an_answer_teaches_nothing_false_of_prompts(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    before = machine.rig.engine.estimate(list(b"new"), "").result(WAIT)
    job = make_scored("scored", "?", text(3, 2047), machine.rig.engine.clock())
    machine.rig.engine.inbox.submit(job)
    machine.rig.runner.allow()
    machine.rig.recorder.end_of("scored")
    after = machine.rig.engine.estimate(list(b"new"), "").result(WAIT)
    assert after.first_token == pytest.approx(before.first_token, rel=0.1)


def test_longer_than_any_seen_is_extrapolated(make_machine: Callable[..., Machine]) -> None:
    assert make_machine().estimate(text(1, 13_000)).extrapolated


def test_before_there_is_a_model_nothing_is_forecast(make_metrics: Callable[..., Metrics]) -> None:
    rig = Rig(make_metrics())
    estimate = rig.engine.estimate([1, 2, 3], "").result(WAIT)
    rig.close()
    assert estimate == Estimate(3, 0, None, None, None, None, extrapolated=False, samples=0)
