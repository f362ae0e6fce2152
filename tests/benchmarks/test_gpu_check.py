"""What a lent machine's time must not be lost to: a step that hangs, and what it said before."""

from __future__ import annotations

import io
import json

import gpu_check

HANGS = """echo '{"benchmark": "first", "us": 2}'; sleep 600 & sleep 600"""


def test_a_step_that_hangs_is_given_up_with_what_it_started_and_its_results_kept() -> None:
    log = io.StringIO()
    step = gpu_check.run(("sh", "-c", HANGS), 0.5, log)
    assert step["exit_code"] == -9
    assert step["seconds"] < 60  # its child holds the pipe open for ten minutes
    assert step["results"] == [{"benchmark": "first", "us": 2}]
    assert json.loads(log.getvalue()) == step["results"][0]


def test_a_program_that_is_missing_fails_its_step_alone() -> None:
    log = io.StringIO()
    assert gpu_check.run(("no-such-program",), 1, log)["exit_code"] == 127
    assert "no-such-program" in log.getvalue()


def test_all_steps_together_take_nine_minutes_at_most() -> None:
    assert sum(limit_s for _, limit_s in gpu_check.STEPS.values()) <= 9 * 60
