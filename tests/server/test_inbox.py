"""What is refused at the door, before a prompt is tokenised, and what a refused client is told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from pagestream.server.errors import DuplicateRequestError, QueueFullError
from pagestream.server.inbox import Inbox, QueueLimits
from pagestream.server.metrics import Metrics
from tests.support.fakes import FakeClock, Rig, make_answers, make_job


def test_prompts_being_tokenised_hold_places_in_the_queue() -> None:
    inbox = Inbox(QueueLimits(max_requests=2, max_tokens=1000), FakeClock())
    inbox.submit(make_job("waits"))
    with ExitStack() as entered:
        entered.enter_context(inbox.entering(1))
        with pytest.raises(QueueFullError), inbox.entering(1):
            pass
    with pytest.raises(ValueError, match="no prompt"), inbox.entering(1):  # however it ends, it lets go
        raise ValueError("no prompt")
    with inbox.entering(1):
        assert inbox.submit(make_job("entered")) == 1


def test_every_answer_to_a_prompt_takes_a_place_and_all_are_taken_on_or_none() -> None:
    inbox = Inbox(QueueLimits(max_requests=4, max_tokens=20), FakeClock())
    with inbox.entering(5, 16):  # an empty queue takes any number
        with pytest.raises(QueueFullError), inbox.entering(1):
            pass
        inbox.submit(*make_answers("first", 2))
    with pytest.raises(QueueFullError), inbox.entering(1, 3):
        pass
    with pytest.raises(QueueFullError), inbox.entering(8, 2):  # 6 + 2 * 8 tokens
        pass
    with pytest.raises(DuplicateRequestError):
        inbox.submit(make_job("first#1"))
    assert (inbox.num_waiting, inbox.num_live) == (2, 2)
    with inbox.entering(7, 2):
        assert inbox.submit(*make_answers("second", 2)) == 2


def test_a_prompt_known_to_be_too_long_for_the_queue_is_refused_before_it_is_tokenised() -> None:
    inbox = Inbox(QueueLimits(max_requests=100, max_tokens=20), FakeClock())
    with inbox.entering(21):  # an empty queue takes any
        pass
    inbox.submit(make_job("waits", prompt="x" * 12))
    with inbox.entering(8):
        pass
    with pytest.raises(QueueFullError), inbox.entering(9):
        pass


def test_the_wait_to_come_is_that_of_reading_what_waits_at_the_speed_of_late(
    make_metrics: Callable[..., Metrics],
) -> None:
    """Steps that only decode do not count: 2 s for 4 prompt tokens each, then 100 decodes of 2 s."""
    clock = FakeClock()
    rig = Rig(make_metrics(), clock=clock, token_budget=4, max_running=1)
    rig.runner.on_step = lambda _plan: setattr(clock, "now", clock.now + 2)
    rig.submit("first", prompt="x" * 40, max_new_tokens=100)
    rig.recorder.end_of("first")
    rig.runner.hold()
    rig.submit("runs", prompt="x", max_new_tokens=50)
    rig.runner.wait_until_held()
    rig.submit("waits", prompt="x" * 40)
    assert rig.engine.inbox.predicted_wait == pytest.approx(40 * 2 / 4, rel=0.1)
    rig.close()
