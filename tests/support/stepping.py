"""A scheduler stepped by hand."""

from __future__ import annotations

import zlib

from pagestream.model.step import SampledToken, SamplingParams, StepPlan, StepResult
from pagestream.server.block_pool import BlockPool
from pagestream.server.request import Request
from pagestream.server.scheduler import Scheduler

EOS, STOP, WORD = 2, 3, 9


def make_request(name: str, num_prompt_tokens: int, max_new_tokens: int = 8, *, capacity: bool = False) -> Request:
    return Request(
        request_id=name,
        prompt=[zlib.crc32(name.encode())] * num_prompt_tokens,  # no two begin alike
        sampling=SamplingParams(),
        max_new_tokens=max_new_tokens,
        max_tokens_is_capacity=capacity,
        eos_token_ids=frozenset({EOS}),
        stop_token_ids=frozenset({STOP}),
    )


def make_scheduler(
    num_blocks: int = 64,
    *,
    block_size: int = 4,
    token_budget: int = 16,
    max_running: int = 8,
    prefix_cache: bool = True,
) -> tuple[BlockPool, Scheduler]:
    pool = BlockPool(num_blocks, block_size, prefix_cache=prefix_cache)
    return pool, Scheduler(pool, token_budget=token_budget, max_running=max_running)


def answer(plan: StepPlan, token_id: int = WORD) -> StepResult:
    return StepResult(tuple((SampledToken(token_id),) * len(chunk.sampled_positions) for chunk in plan.chunks))


def step(scheduler: Scheduler, token_id: int = WORD) -> list[tuple[str, int, int]]:
    """Runs one step that samples `token_id` and returns (request, start, length) of each chunk."""
    plan = scheduler.plan()
    scheduler.commit(plan, answer(plan, token_id))
    scheduler.check_integrity()
    return [(chunk.request_id, chunk.start, chunk.length) for chunk in plan.chunks]
