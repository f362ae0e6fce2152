"""When an engine that does nothing loses readiness, and when it is right to do nothing."""

from __future__ import annotations

from pagestream.server.snapshot import EngineSnapshot
from pagestream.server.watchdog import MAX_FRUITLESS_STEPS, Watchdog

PATIENCE = 3.0


def verdicts(snapshots: list[EngineSnapshot], live: int) -> list[bool]:
    """Of one look each second."""
    watchdog = Watchdog(PATIENCE)
    return [watchdog.is_stalled(100.0 + second, snapshot, live) for second, snapshot in enumerate(snapshots)]


def test_an_idle_engine_is_well() -> None:
    assert not any(verdicts([EngineSnapshot()] * 10, live=0))


def test_an_engine_that_steps_is_well() -> None:
    assert not any(verdicts([EngineSnapshot(running_contexts=[1]) for _ in range(10)], live=3))


def test_an_engine_that_waits_for_its_readers_is_well() -> None:
    assert not any(verdicts([EngineSnapshot(streams_paused=2)] * 10, live=2))


def test_a_step_that_does_not_end_stalls() -> None:
    hanging = EngineSnapshot(running_contexts=[5])
    assert verdicts([hanging] * 5, live=1) == [False, False, False, True, True]


def test_requests_that_nobody_takes_in_stall() -> None:
    """The first step of an idle engine hangs: its snapshot still says that there is nothing to do."""
    assert verdicts([EngineSnapshot()] * 5, live=1)[-1]


def test_requests_that_wait_while_none_runs_stall_however_many_steps_go_by() -> None:
    assert verdicts([EngineSnapshot(waiting_contexts=[5]) for _ in range(5)], live=1)[-1]


def test_steps_that_all_fail_cost_readiness_until_one_succeeds() -> None:
    fruitless = [EngineSnapshot(fruitless_steps=steps) for steps in range(MAX_FRUITLESS_STEPS - 1, 13)]
    assert verdicts([*fruitless, EngineSnapshot()], live=0) == [False, True, True, True, False]


def test_an_engine_that_failed_and_has_been_left_alone_gets_another_chance() -> None:
    failed = EngineSnapshot(fruitless_steps=MAX_FRUITLESS_STEPS)
    assert verdicts([failed] * 5, live=0) == [True, True, True, False, False]


def test_one_step_makes_it_well_again() -> None:
    hanging = EngineSnapshot(running_contexts=[5])
    seen = verdicts([*[hanging] * 5, EngineSnapshot(running_contexts=[6]), EngineSnapshot()], live=1)
    assert seen == [False, False, False, True, True, False, False]
