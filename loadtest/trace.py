"""Recorded traffic: lines of JSON such as {"at": 0.25, "prompt_tokens": 812, "output_tokens": 64}."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class TraceEntry:
    at: float  # seconds from the beginning
    prompt_tokens: int
    output_tokens: int


@cache
def read_trace(path: Path) -> tuple[TraceEntry, ...]:
    """All entries in order of time. Raises ValueError for what is no trace."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            entries.append(TraceEntry(float(fields["at"]), int(fields["prompt_tokens"]), int(fields["output_tokens"])))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: no at, prompt_tokens, output_tokens in {line[:80]!r}") from None
    if not entries:
        raise ValueError(f"{path} is empty")
    return tuple(sorted(entries, key=lambda entry: entry.at))
