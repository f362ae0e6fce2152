"""How the engine stands after a step, for the metrics."""

from __future__ import annotations

from collections.abc import Mapping

from pagestream.server.block_pool import BlockPool
from pagestream.server.job import Job
from pagestream.server.metrics import EngineSnapshot, Metrics
from pagestream.server.scheduler import Scheduler


def report(
    metrics: Metrics, scheduler: Scheduler, pool: BlockPool, jobs: Mapping[str, Job], fruitless_steps: int
) -> None:
    """Called by the engine's thread; `jobs` are those that live, by id."""
    metrics.set_reuse(
        preemptions=scheduler.num_preemptions_total,
        recomputed_tokens=scheduler.recomputed_tokens_total,
        queried_tokens=scheduler.queried_tokens_total,
        hit_tokens=scheduler.hit_tokens_total,
        evicted_blocks=pool.num_evictions_total,
    )
    metrics.snapshot = EngineSnapshot(
        running_contexts=[request.num_tokens for request in scheduler.running],
        waiting_contexts=[request.num_tokens for request in scheduler.waiting],
        streams_paused=len(scheduler.paused),
        waiting_prompt_tokens=scheduler.waiting_tokens,
        oldest_waiting_since=min((jobs[r.request_id].received for r in scheduler.waiting), default=None),
        free_blocks=pool.num_free,
        active_blocks=pool.num_active,
        cached_blocks=pool.num_cached,
        leaked_blocks=pool.num_references - scheduler.num_held_references,
        fruitless_steps=fruitless_steps,
    )
