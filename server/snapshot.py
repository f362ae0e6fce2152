"""How the server and its engine stand, as the health check, the metrics and the watchdog see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from pagestream.server.metric_families import CTX, LabelValues, ctx_of


class ServerState(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STALLED = "stalled"  # work waits and nothing comes of it
    FAILED = "failed"  # the engine is gone


@dataclass(frozen=True, slots=True)
class Status:
    """What the health check and the status page say."""

    state: ServerState
    model: str | None
    running_requests: int
    waiting_requests: int
    kv_cache_usage_ratio: float  # 0 to 1


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine after a step. The defaults are an engine that has not begun."""

    running_contexts: Sequence[int] = ()  # known tokens of each running request
    waiting_contexts: Sequence[int] = ()
    streams_paused: int = 0
    waiting_prompt_tokens: int = 0
    oldest_waiting_since: float | None = None  # a moment, not an age: the age must grow even while the engine hangs
    free_blocks: int = 0
    active_blocks: int = 0
    cached_blocks: int = 0
    leaked_blocks: int = 0
    fruitless_steps: int = 0  # in a row up to this one, in which every request failed

    @property
    def kv_cache_usage_ratio(self) -> float:
        return self.active_blocks / max(1, self.free_blocks + self.active_blocks + self.cached_blocks)

    def gauges(self, now: float) -> dict[str, dict[LabelValues, float]]:
        """Family -> labels -> value. Every ctx is there, also at 0, so that an alert's sum() exists when idle."""
        since = self.oldest_waiting_since
        blocks = {"free": self.free_blocks, "active": self.active_blocks, "cached": self.cached_blocks}
        return {
            "running_requests": _count_by_ctx(self.running_contexts),
            "waiting_requests": _count_by_ctx(self.waiting_contexts),
            "streams_paused": {(): self.streams_paused},
            "waiting_prompt_tokens": {(): self.waiting_prompt_tokens},
            "oldest_waiting_seconds": {(): 0.0 if since is None else now - since},
            "kv_blocks": {(state,): count for state, count in blocks.items()},
            "kv_cache_usage_ratio": {(): self.kv_cache_usage_ratio},
            "kv_leaked_blocks": {(): self.leaked_blocks},
        }


def _count_by_ctx(contexts: Sequence[int]) -> dict[LabelValues, float]:
    counts = Counter(map(ctx_of, contexts))
    return {(ctx,): float(counts[ctx]) for ctx in CTX}
