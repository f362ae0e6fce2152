"""A run in numbers: what was sent and how it ended, latencies by length, goodput, and what the server says of it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from pagestream.loadtest.measures import Objectives, Samples, collect
from pagestream.loadtest.record import OUTCOMES, Record
from pagestream.loadtest.scrape import Histogram, Series, histograms, total
from pagestream.loadtest.statistics import CTX, ctx_of, describe

# measure of the client -> the server's histogram of the same thing by ctx
SERVER_HISTOGRAMS = {
    "ttft": "pagestream_time_to_first_token_seconds",
    "itl": "pagestream_inter_token_latency_seconds",
    "tpot": "pagestream_time_per_output_token_seconds",
}
AGREEMENT = 0.15  # quantiles may differ by so much
_COMPARED = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def summarize(records: Sequence[Record], objectives: Objectives, server: Series | None) -> dict[str, Any]:
    """`server` is what its counters and histograms grew by."""
    samples = collect(records)
    seconds = max((record.ended for record in records), default=0.0)
    answered = [record for record in records if record.outcome == "ok"]
    return {
        "seconds": seconds,
        "requests": len(records),
        "outcomes": {outcome: sum(record.outcome == outcome for record in records) for outcome in OUTCOMES},
        "faults": dict(Counter(record.fault for record in records if record.fault)),
        "prompt_tokens": sum(record.prompt_tokens for record in answered),
        "cached_tokens": sum(record.cached_tokens for record in answered),
        "output_tokens": sum(record.output_tokens for record in records),
        "preemptions": sum(record.preemptions for record in answered),
        "requests_per_second": len(answered) / seconds if seconds else 0.0,
        "output_tokens_per_second": sum(record.output_tokens for record in records) / seconds if seconds else 0.0,
        "send_lag": describe([record.sent - record.scheduled for record in records]) if records else {},
        "latency": {measure: {ctx: describe(each) for ctx, each in by.items()} for measure, by in samples.items()},
        "first_token_over_forecast": _forecasts(records),
        "goodput": _goodput(records, objectives, seconds),
        "errors": _errors(records),
        "agreement": [] if server is None else agreement(samples, server),
        "server": None if server is None else _server(server),
    }


def _forecasts(records: Sequence[Record]) -> dict[str, Any]:
    """The server's time to first token over what it had foretold at receipt, by the prompt's length."""
    ratios = defaultdict(list)
    for record in records:
        if record.is_clean and record.server and record.server.predicted_time_to_first_token:
            ratio = record.server.time_to_first_token / record.server.predicted_time_to_first_token
            ratios[ctx_of(record.prompt_tokens)].append(ratio)
    return {ctx: describe(ratios[ctx]) for ctx in CTX if ctx in ratios}


def _goodput(records: Sequence[Record], objectives: Objectives, seconds: float) -> dict[str, Any]:
    """Requests within their objectives, of those that nobody cut short on purpose, by the prompt's length."""
    counted = defaultdict(list)
    for record in records:
        if record.fault is None:
            counted[ctx_of(record.prompt_tokens)].append(objectives.met_by(record))
    return {
        ctx: {
            "requests": len(counted[ctx]),
            "share": sum(counted[ctx]) / len(counted[ctx]),
            "per_second": sum(counted[ctx]) / seconds if seconds else 0.0,
        }
        for ctx in CTX
        if ctx in counted
    }


def _errors(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Refusals and failures by status and reason, most frequent first, with one message of each."""
    bad = [record for record in records if record.code]
    counts = Counter((record.code, record.reason) for record in bad)
    messages = {(record.code, record.reason): record.message for record in bad}
    return [
        {"code": code, "reason": reason, "count": count, "message": messages[code, reason]}
        for (code, reason), count in counts.most_common()
    ]


def agreement(samples: Samples, server: Series) -> list[dict[str, Any]]:
    """The client's latencies beside the server's histograms of the same requests, by measure and length.

    Both quantiles are read from the same buckets in the same way, because a bucket is wider than the difference that is
    looked for; `client_exact` is the client's own. Counts must be equal when no request was cut short.
    """
    rows = []
    for measure, name in SERVER_HISTOGRAMS.items():
        ours = samples[measure]
        theirs = histograms(server, name, "ctx")
        for ctx in (each for each in CTX if each in ours or each in theirs):
            histogram = theirs.get(ctx, Histogram((math.inf,), (0.0,)))
            mine = ours.get(ctx, [])
            same_buckets = Histogram.of(mine, histogram.edges)
            for quantile, q in _COMPARED.items():
                both = bool(mine and histogram.count)
                client, remote = same_buckets.quantile(q), histogram.quantile(q)
                rows.append(
                    {
                        "measure": measure,
                        "ctx": ctx,
                        "quantile": quantile,
                        "client": client if both else None,
                        "server": remote if both else None,
                        "client_exact": describe(mine)[quantile] if mine else None,
                        "within": both and abs(remote - client) <= AGREEMENT * client,
                        "client_count": len(mine),
                        "server_count": int(histogram.count),
                    }
                )
    return rows


def _server(grown: Series) -> dict[str, float]:
    """Every counter, its labels summed."""
    names = sorted({name for name, _ in grown if name.endswith("_total")})
    return {name: total(grown, name) for name in names}
