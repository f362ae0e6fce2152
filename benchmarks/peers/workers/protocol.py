"""What a worker says on its pipes; imports nothing, for it runs in each peer's own environment.

First one line {"ready": true}. Then for each line, a list of jobs (peers/jobs.py), one line {"moments": [[seconds after
the receipt, ...] for each job]} or {"error": "why"}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

Jobs = list[dict[str, Any]]
Moments = list[list[float]]


def serve(run: Callable[[Jobs], Moments]) -> None:
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201 - the protocol
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"moments": run(json.loads(line))}
        except (RuntimeError, ValueError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)  # noqa: T201


def must_be_one_static_batch(jobs: Jobs) -> None:
    """ValueError otherwise: what libraries that cannot take a request into a running batch are spared."""
    if len({len(job["prompt"]) for job in jobs}) > 1 or any(job["at"] > 0 for job in jobs):
        raise ValueError("not applicable: runs one static batch of equal prompts that arrive together")
