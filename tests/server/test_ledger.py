"""Who waits for whom: nothing is lost, nothing charged twice, and the right one pays."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.step import StepPlan
from pagestream.server.cost_model import CostModel, Work, decodes_at, prompt_from
from pagestream.server.events import Finished
from pagestream.server.job import Job
from pagestream.server.ledger import NANOSECONDS, Account, Ledger, PromptChunk, TokenOf
from pagestream.server.metrics import Metrics
from tests.support.fakes import FakeClock, Rig

STEP, TOKEN = 0.01, 0.001  # seconds of a step, and of a prompt token in it


@functools.cache
def taught() -> CostModel:
    """Knows a machine on which a step takes STEP, and TOKEN more for each token of a prompt."""
    model, chance = CostModel(), random.Random(1)
    for _ in range(200):
        decodes, tokens = decodes_at([50]), chance.choice((0, 10, 100))
        model.observe(decodes.beside(prompt_from(0, tokens)), 100, STEP + TOKEN * tokens)
    return model


def chunk(account: Account, tokens: int) -> PromptChunk:
    return PromptChunk(account, tokens, prompt_from(0, tokens))


def step_of(chunks: list[PromptChunk], rows: int) -> Work:
    work = decodes_at([50] * rows)
    for part in chunks:
        work = work.beside(part.work)
    return work


gaps = st.none() | st.floats(0, 1)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 3), gaps, st.booleans()), max_size=4, unique_by=lambda t: t[0]),
            st.lists(st.tuples(st.integers(4, 6), st.integers(1, 300)), max_size=3),
        ),
        max_size=12,
    )
)
def test_what_is_suffered_is_what_is_caused(
    steps: list[tuple[list[tuple[int, float | None, bool]], list[tuple[int, int]]]],
) -> None:
    """To the nanosecond, in each step and in all; and every gap above its forecast is in one of the three sums."""
    ledger, accounts, preemptions = Ledger(taught()), [Account() for _ in range(7)], [0] * 4
    totals = [0, 0, 0]
    for decoding, reading in steps:
        tokens = []
        for who, gap, preempted in decoding:
            preemptions[who] += preempted
            tokens.append(TokenOf(accounts[who], gap, preemptions[who]))
        chunks = [chunk(accounts[who], length) for who, length in reading]
        stalls = ledger.charge(step_of(chunks, len(tokens)), tokens, chunks)
        assert sum(ns for _, ns in stalls.caused) == stalls.prefill
        assert min(stalls.prefill, stalls.preemption, stalls.other, *(ns for _, ns in stalls.caused), 0) == 0
        above = 0
        for account, gap, _ in tokens:
            if gap is None:
                assert account.predicted_gap is account.stall is None
            else:
                assert account.predicted_gap is not None
                above += max(round((gap - account.predicted_gap) * NANOSECONDS), 0)
                assert 0 <= (account.stall or 0) <= max(gap - account.predicted_gap, 0) + 1e-9
        assert stalls.prefill + stalls.preemption + stalls.other == above
        totals = [total + ns for total, ns in zip(totals, stalls, strict=False)]
    assert sum(account.suffered_ns for account in accounts) == sum(account.caused_ns for account in accounts)
    assert sum(account.suffered_ns for account in accounts) == totals[0]
    assert sum(account.prefill_chunks for account in accounts) == sum(len(reading) for _, reading in steps)


def test_prompts_pay_what_they_cost_and_not_what_else_made_the_step_slow() -> None:
    ledger, stream, short, long = Ledger(taught()), Account(), Account(), Account()
    ledger.charge(step_of([], 1), [TokenOf(stream, None, 0)], [])
    chunks = [chunk(short, 20), chunk(long, 80)]
    stalls = ledger.charge(step_of(chunks, 1), [TokenOf(stream, STEP + 100 * TOKEN + 0.05, 0)], chunks)
    assert stalls.prefill / NANOSECONDS == pytest.approx(100 * TOKEN, rel=0.02)
    assert stalls.other / NANOSECONDS == pytest.approx(0.05, rel=0.05)
    assert stream.stall == stream.suffered == pytest.approx(100 * TOKEN, rel=0.02)
    assert stream.predicted_gap == pytest.approx(STEP, rel=0.02)
    assert (short.caused, long.caused) == pytest.approx((20 * TOKEN, 80 * TOKEN), rel=0.05)
    assert [length for length, _ in stalls.caused] == [20, 80]


def test_a_preempted_stream_waits_for_its_place_and_one_that_was_away_for_nobody() -> None:
    ledger, stream, prompt = Ledger(taught()), Account(), Account()
    ledger.charge(step_of([], 1), [TokenOf(stream, None, 0)], [])
    ledger.charge(step_of([], 0).beside(prompt_from(0, 50)), [], [chunk(prompt, 50)])  # out of the batch
    away = ledger.charge(step_of([], 1), [TokenOf(stream, 0.5, 0)], [])
    lost = ledger.charge(step_of([], 1), [TokenOf(stream, 0.7, 1)], [])
    assert (away.prefill, away.preemption, lost.prefill, lost.other) == (0, 0, 0, 0)
    assert away.other / NANOSECONDS == pytest.approx(0.5 - STEP, rel=0.02)
    assert lost.preemption / NANOSECONDS == pytest.approx(0.7 - STEP, rel=0.02)
    assert prompt.caused_ns == 0


def test_nothing_is_charged_before_the_model_knows() -> None:
    ledger, stream, prompt = Ledger(CostModel()), Account(), Account()
    chunks = [chunk(prompt, 50)]
    assert ledger.charge(step_of(chunks, 1), [TokenOf(stream, 9.0, 0)], chunks) == (0, 0, 0, ())
    assert (stream.predicted_gap, stream.stall, prompt.prefill_chunks) == (None, None, 1)


def test_an_engine_charges_the_prompt_that_made_the_stream_wait(make_metrics: Callable[..., Metrics]) -> None:
    """A machine of known cost: the stream's lost time is the prompt's debt, in the jobs and in the metrics."""
    clock, jobs = FakeClock(), dict[str, Job]()
    rig = Rig(make_metrics(clock), num_blocks=1000, token_budget=64, clock=clock)

    def on_step(plan: StepPlan) -> None:
        clock.now += STEP + TOKEN * sum(part.length for part in plan.chunks if not part.is_decode)

    rig.runner.on_step = on_step
    rig.submit("warm-up", prompt="w" * 640, max_new_tokens=20)
    rig.recorder.end_of("warm-up")
    rig.runner.hold()
    jobs["stream"] = rig.submit("stream", prompt="s" * 70, max_new_tokens=60)
    rig.runner.wait_until_held()
    rig.runner.allow(5)
    rig.runner.wait_until_held()
    jobs["long"] = rig.submit("long", prompt="l" * 630, max_new_tokens=1)
    rig.runner.allow()
    ends = [rig.recorder.end_of(name) for name in jobs]
    rig.close()
    assert all(isinstance(end, Finished) for end in ends)
    suffered, caused = jobs["stream"].ledger, jobs["long"].ledger
    assert suffered.suffered_ns == caused.caused_ns
    assert caused.caused == pytest.approx(630 * TOKEN, rel=0.1)
    assert (caused.prefill_chunks, caused.suffered_ns, suffered.caused_ns) == (10, 0, 0)
    values = rig.metrics.read().values
    assert values["stall_seconds_total"]["prefill",] == pytest.approx(caused.caused)
    assert values["stall_caused_seconds_total"]["1024",] == pytest.approx(caused.caused)
