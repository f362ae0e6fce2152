"""Forecasts where little is known: a number, whatever it is worth, and never an exception on the engine's thread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pagestream.server.cost_model import decodes_at, prompt_from
from pagestream.server.forecast import Forecast
from pagestream.server.pace import MIN_PROMPT_TOKENS, Pace


def test_decodes_of_unknown_cost_beside_steps_that_miss_the_target() -> None:
    """Every step so far has read a prompt, and took longer than the target: nothing is left for prompts."""
    pace = Pace(target_gap=0.06)
    for _ in range(50):
        pace.model.observe(prompt_from(0, 512), 512, 1.0)
    scheduler: Any = SimpleNamespace(token_budget=512)
    pool: Any = None
    decodes = decodes_at([50])
    work = prompt_from(0, 400)
    steps = Forecast(pace, scheduler, pool)._num_steps(work, decodes)
    assert 1 <= steps <= work.tokens / MIN_PROMPT_TOKENS
