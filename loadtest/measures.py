"""The five latencies of a request, each under the length that it is told by.

| name | seconds | length |
|---|---|---|
| ttft | from sending to the first token | the prompt's |
| itl | each gap between tokens | the context at the later token |
| tpot | first to last token, over the tokens after the first | the context at the end |
| max_gap | the longest of its gaps | the context at the end |
| e2e | from sending to the end of the stream | the prompt's |
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from pagestream.loadtest.record import Record
from pagestream.loadtest.statistics import CTX, ctx_of

MEASURES = ("ttft", "itl", "tpot", "max_gap", "e2e")
TITLES = {
    "ttft": "time to first token",
    "itl": "gap between tokens",
    "tpot": "time per output token",
    "max_gap": "longest gap",
    "e2e": "whole request",
}
Samples = dict[str, dict[str, list[float]]]  # measure -> ctx -> seconds


@dataclass(frozen=True)
class Objectives:
    """Seconds that a good request stays within; None is no objective."""

    ttft: float | None = None
    itl: float | None = None  # for the longest gap
    tpot: float | None = None
    e2e: float | None = None

    def met_by(self, record: Record) -> bool:
        """Answered in full and within every objective."""
        if record.outcome != "ok" or not record.tokens:
            return False
        values = of_request(record)
        limits = (("ttft", self.ttft), ("max_gap", self.itl), ("tpot", self.tpot), ("e2e", self.e2e))
        return all(limit is None or values.get(name, 0.0) <= limit for name, limit in limits)


def of_request(record: Record) -> dict[str, float]:
    """Of one request with a first token; those of gaps are missing with a single token."""
    values = {"ttft": record.time_to_first_token, "e2e": record.ended - record.sent}
    if len(record.tokens) > 1 and record.output_tokens > 1:
        values["tpot"] = (record.tokens[-1] - record.tokens[0]) / (record.output_tokens - 1)
        values["max_gap"] = max(later - earlier for earlier, later in pairwise(record.tokens))
    return values


def length_of(measure: str, record: Record) -> int:
    """Tokens that a request's measure is told by."""
    if measure in ("ttft", "e2e"):
        return record.prompt_tokens
    return record.prompt_tokens + record.output_tokens


def gaps_of(record: Record) -> list[tuple[int, float]]:
    """(context, seconds) of each token after the first."""
    pairs = enumerate(pairwise(record.tokens), start=record.prompt_tokens + 2)
    return [(context, later - earlier) for context, (earlier, later) in pairs]


def collect(records: Iterable[Record]) -> Samples:
    """Of clean requests. Lengths without samples are missing; lengths are in order."""
    found: dict[str, defaultdict[str, list[float]]] = {measure: defaultdict(list) for measure in MEASURES}
    for record in records:
        if not record.is_clean or not record.tokens:
            continue
        for measure, seconds in of_request(record).items():
            found[measure][ctx_of(length_of(measure, record))].append(seconds)
        for context, gap in gaps_of(record):
            found["itl"][ctx_of(context)].append(gap)
    return {measure: {ctx: by[ctx] for ctx in CTX if ctx in by} for measure, by in found.items()}
