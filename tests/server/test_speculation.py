"""Proposals: what is proposed, what is kept of it, and that answers end where they would without."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.step import SampledToken, StepResult
from pagestream.server.events import Finished
from pagestream.server.metrics import Metrics
from pagestream.server.prompt_lookup import MAX_PROPOSED, PromptLookup
from pagestream.server.request import FinishReason, Request
from pagestream.server.speculation import MAX_ROWS
from tests.support.fakes import END, Rig, make_job
from tests.support.scheduling import VOCABULARY, Simulation, make_request
from tests.support.waiting import wait_until


def last_seen(tokens: list[int]) -> list[int]:
    """The oracle: what followed the last earlier occurrence of the latest three or else two tokens."""
    for size in (3, 2):
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(tokens) > size and tokens[start : start + size] == tokens[-size:]:
                return tokens[start + size :]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.data())
def test_proposed_is_what_followed_the_latest_tokens_when_they_were_last_seen(
    tokens: list[int], data: st.DataObject
) -> None:
    """However the tokens come, one by one or many at once; a loop goes on."""
    lookup, known = PromptLookup(), 0
    lookup.observe(100, 100)
    while known < len(tokens):
        known = data.draw(st.integers(known + 1, len(tokens)))
        limit = data.draw(st.integers(0, 9))
        expected = (last_seen(tokens[:known]) * 10)[: min(limit, MAX_PROPOSED)]
        assert lookup.propose(tokens[:known], limit) == expected


def test_failing_proposals_become_few_and_come_back_when_they_succeed() -> None:
    lookup, text = PromptLookup(), [1, 2, 3] * 2
    sizes = []
    for _ in range(200):
        sizes.append(len(lookup.propose(text, 7)))
        lookup.observe(sizes[-1], 0)
    assert sizes[0] >= 1
    assert sum(sizes) <= 12
    assert sum(sizes[-100:]) >= 2
    for _ in range(100):
        sizes.append(len(lookup.propose(text, 7)))
        lookup.observe(sizes[-1], sizes[-1])
    assert sizes[-1] == MAX_PROPOSED


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), st.integers(1, 40))),
    st.sampled_from((2, 4)),
    st.booleans(),
    st.randoms(),
)
def test_proposals_right_and_wrong_leave_answers_and_accounts_as_they_are(
    wanted: list[tuple[list[int], int]], block_size: int, prefix_cache: bool, chance: random.Random
) -> None:
    """Requests come one after the other, so that steps without prompts lie between."""
    simulation = Simulation(40, block_size, 16, 6, prefix_cache=prefix_cache, speculation=True)
    for number, (prompt, max_new_tokens) in enumerate(wanted):
        simulation.admit(make_request(number, prompt, max_new_tokens))
        for _ in range(chance.randrange(8)):
            simulation.step()
    simulation.run_to_the_end()
    simulation.check_answers()


def test_many_proposals_are_kept() -> None:
    chance = random.Random(1)
    simulation = Simulation(64, 4, 32, 6, speculation=True)
    for number in range(100):
        prompt = chance.choices(range(VOCABULARY), k=chance.randint(1, 24))
        simulation.admit(make_request(number, prompt, 60, ends=number % 2 == 0))
        for _ in range(10):
            simulation.step()
    simulation.run_to_the_end()
    simulation.check_answers()
    assert simulation.events["accepted"] > 1000


class Everything(PromptLookup):
    """Proposes as much as it may."""

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        return [tokens[-1]] * limit


def test_proposals_keep_to_the_rows_and_never_stand_beside_prompts() -> None:
    simulation = Simulation(64, 4, 32, 6, speculation=True)
    for number in range(3):
        request = make_request(number, [3] * 40, 60, ends=False)
        simulation.admit(request)
        request.lookup = Everything()
    most = 0
    for _ in range(60):
        plan = simulation.scheduler.plan()
        if any(chunk.proposed for chunk in plan.chunks):
            assert all(chunk.is_decode for chunk in plan.chunks)
            most = max(most, plan.num_tokens)
        simulation.scheduler.commit(plan, simulation.runner.step(plan))
    assert most == MAX_ROWS


@pytest.mark.parametrize(
    ("prompt", "settings", "reason"),
    [
        ("abcdef" * 4, {"max_new_tokens": 41}, FinishReason.MAX_TOKENS),
        ("abcdef" * 4, {"max_new_tokens": 200, "stop_strings": ("fabcdefa",)}, FinishReason.STOP_STRING),
        ("abcdef" * 10, {"max_new_tokens": 90, "stop_strings": ("xyz",)}, FinishReason.MAX_TOKENS),
    ],
)
def test_an_answer_ends_inside_a_run_as_without_proposals(
    make_metrics: type[Metrics], prompt: str, settings: dict[str, object], reason: FinishReason
) -> None:
    ends = []
    for speculation in (False, True):
        rig = Rig(make_metrics(), speculation=speculation)
        rig.submit("r", prompt=prompt, **settings)
        end = rig.recorder.end_of("r")
        assert isinstance(end, Finished)
        wait_until(lambda rig=rig: rig.metrics.snapshot.active_blocks == 0, "the engine is idle")
        rig.close()
        values = rig.metrics.read().values
        ends.append((rig.recorder.text_of("r"), end.reason, end.matched_stop, end.output_tokens))
        assert len(end.timings.gaps) == end.output_tokens - 1
        assert sum(end.timings.gaps) == pytest.approx(end.timings.decode)
        assert values["output_tokens_total"][()] == end.output_tokens
        assert (values["speculated_tokens_total"]["accepted",] > 10) == speculation
        rig.scheduler.check_integrity()
    assert ends[0] == ends[1]
    assert ends[0][1] is reason


def test_an_end_token_inside_a_run_drops_what_follows() -> None:
    job = make_job("r", prompt="ab")
    request: Request = job.request
    simulation = Simulation(8, 4, 16, 1, speculation=True)
    simulation.admit(request)
    request.lookup = Everything()
    simulation.scheduler.commit(plan := simulation.scheduler.plan(), simulation.runner.step(plan))
    plan = simulation.scheduler.plan()
    (chunk,) = plan.chunks
    assert len(chunk.proposed) == 4
    first, *_ = chunk.proposed
    run = tuple(map(SampledToken, (first, END, 7, 7, 7)))
    request.eos_token_ids = frozenset({END, first + 1})
    chunk.proposed[1:] = [END, 7, 7]
    (advance,) = simulation.scheduler.commit(plan, StepResult((run,)))
    assert advance.sampled == run[:2]
    assert request.finish_reason is FinishReason.END_OF_SEQUENCE
    assert request.tokens[-2:] == [first, END]
    assert simulation.pool.num_active == 0
