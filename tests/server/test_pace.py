"""Prompt tokens beside decodes, chosen so that a step takes as long as it may: against machines of known cost."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pagestream.model.step import Chunk, SamplingParams, StepPlan
from pagestream.server.cost_model import work_of
from pagestream.server.events import Finished
from pagestream.server.metrics import Metrics
from pagestream.server.pace import MIN_PROMPT_TOKENS, Pace
from pagestream.server.request import Request
from tests.support.fakes import FakeClock, Rig

TILE = 16  # tokens: longer chunks are multiples of it
AIM = 0.9  # of the target


@dataclass(frozen=True)
class Machine:
    """Seconds: for a step, a decoded row, a token it attends to, a prompt token, a token that one attends to."""

    step: float = 0.02
    row: float = 0.001
    context: float = 1e-6
    token: float = 0.0015
    attended: float = 4e-7

    def seconds(self, plan: StepPlan) -> float:
        total = self.step
        for chunk in plan.chunks:
            if chunk.is_decode:
                total += chunk.length * self.row + chunk.end * self.context
            else:
                total += chunk.length * self.token
                total += self.attended * sum(range(chunk.start + 1, chunk.end + 1))
        return total


def decode(context: int) -> Chunk:
    return Chunk("d", range(context), 1, context - 1, 1, (), SamplingParams())


def prompt(start: int, length: int) -> Chunk:
    return Chunk("p", range(100_000), 100_000, start, length, (), SamplingParams())


def running(contexts: list[int], start: int | None) -> list[Request]:
    """Requests that decode at these contexts, and one whose prompt is read up to `start`."""
    requests = []
    for context in contexts:
        requests.append(request := Request("d", [0], SamplingParams(), 100_000))
        request.tokens.extend([0] * (context - 1))
        request.num_computed = context - 1
    if start is not None:
        requests.append(request := Request("p", [0] * 100_000, SamplingParams(), 1))
        request.num_computed = start
    return requests


def taught(pace: Pace, machine: Machine, steps: int = 300, noise: float = 0.0, seed: int = 1) -> Pace:
    """Shows it `steps` steps of all kinds."""
    chance = random.Random(seed)
    for _ in range(steps):
        chunks = [decode(chance.randint(1, 8000)) for _ in range(chance.choice((0, 1, 1, 2, 8)))]
        if chance.random() < 0.5 or not chunks:
            chunks.append(prompt(chance.randint(0, 8000), chance.randint(1, 512)))
        plan = StepPlan(tuple(chunks))
        pace.model.observe(work_of(plan.chunks), 8000, machine.seconds(plan) * (1 + chance.uniform(-noise, noise)))
    return pace


@pytest.mark.parametrize("start", [0, 1000, 8000])
@pytest.mark.parametrize("contexts", [[50], [4000], [300] * 10])
@pytest.mark.parametrize("target", [0.06, 0.2])
def test_a_step_of_the_chosen_length_takes_as_long_as_it_aims_at(
    target: float, contexts: list[int], start: int
) -> None:
    machine = Machine()
    length = taught(Pace(target), machine).prompt_tokens(running(contexts, start))
    assert length is not None
    assert length > MIN_PROMPT_TOKENS or (target, start) >= (0.06, 1000)
    if length > MIN_PROMPT_TOKENS:
        rest = [decode(context) for context in contexts]
        seconds, more = (machine.seconds(StepPlan((*rest, prompt(start, n)))) for n in (length, length + TILE))
        assert AIM * target - (more - seconds) <= seconds <= 1.05 * AIM * target
        assert length < 3 * TILE or length % TILE == 0


def test_nobody_waits_so_nothing_is_limited() -> None:
    pace = taught(Pace(0.06), Machine())
    assert pace.prompt_tokens(running([], 500)) is None
    assert pace.prompt_tokens([]) is None


def test_prompts_get_on_where_nothing_is_known() -> None:
    assert Pace(0.06).prompt_tokens(running([100], 500)) == MIN_PROMPT_TOKENS


def test_prompts_get_a_third_of_the_time_where_decodes_alone_miss_the_target() -> None:
    machine = Machine(step=0.08)
    length = taught(Pace(0.06), machine).prompt_tokens(running([100], 500))
    assert length is not None
    alone = machine.seconds(StepPlan((decode(100),)))
    assert machine.seconds(StepPlan((decode(100), prompt(500, length)))) == pytest.approx(1.5 * alone, rel=0.05)


def test_hours_of_decoding_wash_out_nothing_that_is_known_of_prompts() -> None:
    pace, machine = taught(Pace(0.06), Machine()), Machine()
    before = pace.prompt_tokens(running([500], 1000))
    for step in range(5000):
        plan = StepPlan((decode(100 + step % 900),))
        pace.model.observe(work_of(plan.chunks), 1000, machine.seconds(plan))
    assert pace.prompt_tokens(running([500], 1000)) == pytest.approx(before, rel=0.1)


def test_it_learns_again_when_the_machine_changes() -> None:
    slow = Machine(0.03, 0.002, 2e-6, 0.003, 8e-7)
    changed = taught(taught(Pace(0.1 / AIM), Machine()), slow, steps=1500)
    assert changed.prompt_tokens(running([500], 1000)) == taught(Pace(0.1 / AIM), slow, steps=1500).prompt_tokens(
        running([500], 1000)
    )


def test_from_the_second_step_beside_a_stream_on_small_chunks_keep_to_the_target() -> None:
    """Known are whole prompts and decodes alone; beside a stream, all costs 1.4 times as much. One step in their midst
    takes three times as long, for no reason of ours."""
    pace, machine, start = Pace(0.06 / AIM), Machine(), 0
    for step in range(60):
        for chunk in (prompt(512 * (step % 16), 512), decode(1500 + step)):
            plan = StepPlan((chunk,))
            pace.model.observe(work_of(plan.chunks), 8000, machine.seconds(plan))
    times = []
    for step in range(20):
        length = pace.prompt_tokens(running([1500 + step], start))
        assert length is not None
        plan = StepPlan((decode(1500 + step), prompt(start, length)))
        times.append(1.4 * machine.seconds(plan))
        pace.model.observe(work_of(plan.chunks), 8000, times[-1] * (3 if step == 10 else 1))
        start += length
    assert times[0] > 1.3 * 0.06
    assert max(times[1:]) < 1.05 * 0.06
    assert min(times[1:]) > 0.8 * 0.06


def test_noise_moves_it_little() -> None:
    exact = taught(Pace(0.06 / AIM), Machine()).prompt_tokens(running([500], 1000))
    for seed in range(20):
        noisy = taught(Pace(0.06 / AIM), Machine(), noise=0.2, seed=seed).prompt_tokens(running([500], 1000))
        assert noisy == pytest.approx(exact, rel=0.3)


def test_a_stream_keeps_its_gaps_a_short_prompt_is_soon_and_a_long_one_gets_on(
    make_metrics: Callable[..., Metrics],
) -> None:
    """The engine on a machine of known cost: one stream decodes, 8,000 tokens of prompt arrive, then 32."""
    clock, machine, target = FakeClock(), Machine(attended=2e-7), 0.06
    rig = Rig(make_metrics(), num_blocks=1000, token_budget=512, clock=clock, target_gap=target)
    late: list[float] = []

    def on_step(plan: StepPlan) -> None:  # on the engine's thread
        seconds = sum(
            machine.row + chunk.end * machine.context
            if chunk.start >= chunk.num_prompt_tokens
            else chunk.length * machine.token + machine.attended * chunk.length * (chunk.start + chunk.length / 2)
            for chunk in plan.chunks
        )
        clock.now += machine.step + seconds
        if not late and any(chunk.request_id == "long" and chunk.start > 4000 for chunk in plan.chunks):
            late.append(clock.now)
            rig.submit("short", prompt="x" * 32, max_new_tokens=1)

    rig.runner.on_step = on_step
    rig.submit("warm-up", prompt="x" * 2000, max_new_tokens=20)
    rig.recorder.end_of("warm-up")
    rig.runner.hold()
    rig.submit("stream", max_new_tokens=3000)
    rig.submit("long", prompt="x" * 8000, max_new_tokens=1)
    rig.runner.allow()
    ends = {name: rig.recorder.end_of(name) for name in ("stream", "long", "short")}
    rig.close()
    stream, long, short = (end for end in ends.values() if isinstance(end, Finished))
    gaps = sorted(stream.timings.gaps[1:])
    assert gaps[int(0.99 * len(gaps))] <= 1.1 * target
    assert (short.timings.time_to_first_token or 0) <= 2 * target + machine.step + 32 * machine.token
    least = 8000 * machine.token + 8000**2 / 2 * machine.attended
    assert (long.timings.time_to_first_token or 0) <= 3 * least
