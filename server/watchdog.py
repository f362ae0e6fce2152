"""Whether the engine gets on: what loses it readiness when work waits and nothing comes of it."""

from __future__ import annotations

import math

from pagestream.server.snapshot import EngineSnapshot

MAX_FRUITLESS_STEPS = 10  # so many in a row lose readiness


class Watchdog:
    """Looks at the engine from outside, now and then; `patience` is in seconds on the clock of its caller.

    The engine replaces its snapshot after every step. So it hangs if live requests are not all paused and the snapshot
    stays the same; and it is stuck, which the scheduler's law rules out, if requests wait and none runs, however many
    steps go by. It fails if many steps in a row had no success, whosever fault each one was; when the last of them is
    older than patience, it gets another chance, because without readiness nobody would give it one.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._seen: EngineSnapshot | None = None
        self._last_good: float | None = None
        self._last_failure = -math.inf

    def is_stalled(self, now: float, snapshot: EngineSnapshot, live_requests: int) -> bool:
        """Whether nothing has come of the work there is for as long as patience lasts."""
        hangs = snapshot is self._seen and live_requests > snapshot.streams_paused
        stuck = bool(snapshot.waiting_contexts) and not snapshot.running_contexts
        if snapshot.fruitless_steps >= MAX_FRUITLESS_STEPS and snapshot is not self._seen:
            self._last_failure = now
        fails = snapshot.fruitless_steps > 0 and now - self._last_failure < self._patience
        self._seen = snapshot
        if self._last_good is None or not (hangs or stuck):
            self._last_good = now
        return fails or now - self._last_good >= self._patience
