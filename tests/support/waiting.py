"""How long tests wait for what must come."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT = 60.0  # seconds: far more than anything takes on a machine with much else to do, so that only what hangs fails


def wait_until(condition: Callable[[], bool], what: str, seconds: float = WAIT) -> None:
    """Looks every few milliseconds, for states that nothing announces."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"waited {seconds:g} s in vain until {what}"
        time.sleep(0.005)
