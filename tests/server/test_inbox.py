"""What is refused at the door, before a prompt is tokenised, and what a refused client is told."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import pytest

from pagestream.server.errors import DuplicateRequestError, QueueFullError
from pagestream.server.inbox import Inbox, QueueLimits
from pagestream.server.metrics import Metrics
from pagestream.server.waiting import Demand
from tests.support.fakes import FakeClock, Rig, make_answers, make_job


def test_prompts_being_tokenised_hold_places_in_the_queue() -> None:
    inbox = Inbox(QueueLimits(max_requests=2, max_tokens=1000), FakeClock())
    inbox.submit(make_job("waits"))
    with contextlib.ExitStack() as entered:
        entered.enter_context(inbox.entering("", 1))
        with pytest.raises(QueueFullError), inbox.entering("", 1):
            pass
    with pytest.raises(ValueError, match="no prompt"), inbox.entering("", 1):  # however it ends, it lets go
        raise ValueError("no prompt")
    with inbox.entering("", 1):
        assert inbox.submit(make_job("entered")) == 1


def test_every_answer_to_a_prompt_takes_a_place_and_all_are_taken_on_or_none() -> None:
    inbox = Inbox(QueueLimits(max_requests=4, max_tokens=20), FakeClock())
    with inbox.entering("", 5, 16):  # an empty queue takes any number
        with pytest.raises(QueueFullError), inbox.entering("", 1):
            pass
        inbox.submit(*make_answers("first", 2))
    with pytest.raises(QueueFullError), inbox.entering("", 1, 3):
        pass
    with pytest.raises(QueueFullError), inbox.entering("", 8, 2):  # 6 + 2 * 8 tokens
        pass
    with pytest.raises(DuplicateRequestError):
        inbox.submit(make_job("first#1"))
    assert (inbox.num_waiting, inbox.num_live) == (2, 2)
    with inbox.entering("", 7, 2):
        assert inbox.submit(*make_answers("second", 2)) == 2


def test_a_prompt_known_to_be_too_long_for_the_queue_is_refused_before_it_is_tokenised() -> None:
    inbox = Inbox(QueueLimits(max_requests=100, max_tokens=20), FakeClock())
    with inbox.entering("", 21):  # an empty queue takes any
        pass
    inbox.submit(make_job("waits", prompt="x" * 12))
    with inbox.entering("", 8):
        pass
    with pytest.raises(QueueFullError), inbox.entering("", 9):
        pass


def ask(inbox: Inbox, tenant: str, name: str, prompt: str = "x") -> bool:
    """Whether it is taken on."""
    job = make_job(name, prompt=prompt)
    job.request.tenant = tenant
    with contextlib.suppress(QueueFullError), inbox.entering(tenant, 1):
        inbox.submit(job)
        return True
    return False


def fill(inbox: Inbox, tenant: str, prompt: str = "x") -> int:
    """How many are taken on before one is refused."""
    return next(n for n in itertools.count() if not ask(inbox, tenant, f"{tenant}{inbox.num_live}", prompt))


@pytest.mark.parametrize(("limits", "prompt"), [((70, 10_000), "x"), ((10_000, 700), "x" * 10)])
def test_whoever_comes_next_finds_room_in_the_queue(limits: tuple[int, int], prompt: str) -> None:
    inbox = Inbox(QueueLimits(*limits), FakeClock())
    assert ask(inbox, "other", "early", prompt)
    assert [fill(inbox, tenant, prompt) for tenant in "ab"] == [51, 13]  # 3/4 of 69 and of 70 - 51 - 1
    assert ask(inbox, "c", "c", prompt)
    assert fill(inbox, "other", prompt) == 2  # 3/4 of what 51 + 13 + 1 leave of 70
    assert ask(inbox, "d", "d", prompt)


def test_who_is_alone_may_fill_the_queue_and_gives_way_to_whoever_comes() -> None:
    clock = FakeClock()
    inbox = Inbox(QueueLimits(20, 10_000), clock)
    assert fill(inbox, "greedy") == 20
    assert not ask(inbox, "late", "late")
    inbox.settle({"greedy": Demand(19, 19)}, 1.0, 0.1)  # with 20 arrivals still to be looked at: 39 wait
    inbox.take(0.0)
    inbox.settle({"greedy": Demand(19, 19)}, 1.0, 0.1)
    assert not ask(inbox, "greedy", "again")
    assert ask(inbox, "late", "late")
    clock.now += 61  # since then, nobody else has asked
    inbox.settle({"greedy": Demand(19, 19)}, 1.0, 0.1)
    inbox.take(0.0)
    inbox.settle({"greedy": Demand(19, 19)}, 1.0, 0.1)
    assert ask(inbox, "greedy", "alone")


def test_the_wait_to_come_is_that_of_reading_what_waits_at_the_speed_of_late(
    make_metrics: Callable[..., Metrics],
) -> None:
    """Steps that only decode do not count: 2 s for 16 prompt tokens each, then 100 decodes of 2 s."""
    clock = FakeClock()
    rig = Rig(make_metrics(), clock=clock, token_budget=16, max_running=1)
    rig.runner.on_step = lambda _plan: setattr(clock, "now", clock.now + 2)
    rig.submit("first", prompt="x" * 160, max_new_tokens=100)
    rig.recorder.end_of("first")
    rig.runner.hold()
    rig.submit("runs", prompt="x", max_new_tokens=50)
    rig.runner.wait_until_held()
    rig.submit("waits", prompt="y" * 160)
    assert rig.engine.inbox.predicted_wait == pytest.approx(160 * 2 / 16, rel=0.1)
    rig.close()
