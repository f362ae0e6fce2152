"""What the live page is told: the numbers of /metrics, and the last requests without anything that names them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pagestream.model.step import SamplingParams
from pagestream.server.collector import make_registry
from pagestream.server.events import Timings
from pagestream.server.live import live_json
from pagestream.server.metrics import Metrics
from pagestream.server.recent import MAX_RECENT
from pagestream.server.request import FinishReason, Request
from pagestream.server.snapshot import EngineSnapshot

MakeMetrics = Callable[..., Metrics]


def read(metrics: Metrics) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    document: dict[str, Any] = json.loads(live_json(metrics), parse_constant=refuse)
    return document


def finish(metrics: Metrics, prompt_tokens: int, reason: FinishReason = FinishReason.MAX_TOKENS) -> None:
    request = Request("secret-id", range(prompt_tokens), SamplingParams(), max_new_tokens=9, tenant="secret-tenant")
    timings = Timings(queue=0.25, prefill=0.5, decode=0.3, time_to_first_token=0.75, gaps=(0.1, 0.2))
    metrics.observe_finished(reason, request, timings, 1.5)


def test_it_says_what_the_exposition_says(make_metrics: MakeMetrics) -> None:
    metrics = make_metrics()
    metrics.observe_gaps([100, 100, 5000], [0.004, 0.3, 99.0])
    metrics.observe_first_delta(700, 0.05)
    metrics.snapshot = EngineSnapshot(running_contexts=(5, 600), free_blocks=7, active_blocks=3)
    finish(metrics, 40)
    families = read(metrics)["families"]
    exposed = {f.name: f for f in text_string_to_metric_families(generate_latest(make_registry(metrics)).decode())}
    compared = 0
    for name, family in families.items():
        for labels, *values in family["series"]:
            wanted = dict(zip(family["labels"], labels, strict=True))
            samples = [
                s
                for s in exposed[f"pagestream_{name}".removesuffix("_total")].samples
                if {k: v for k, v in s.labels.items() if k not in {"model", "le"}} == wanted
            ]
            if "edges" in family:
                buckets = {float(s.labels["le"]): s.value for s in samples if s.name.endswith("_bucket")}
                assert dict(zip([*family["edges"], math.inf], values[0], strict=True)) == buckets
                assert values[1] == next(s.value for s in samples if s.name.endswith("_sum"))
            elif name != "oldest_waiting_seconds":
                assert values == [s.value for s in samples if not s.name.endswith("_created")]
            compared += 1
    assert compared > 60


def test_histograms_without_samples_are_left_out(make_metrics: MakeMetrics) -> None:
    metrics = make_metrics()
    metrics.observe_gaps([100], [0.004])
    families = read(metrics)["families"]
    assert [labels for labels, *_ in families["inter_token_latency_seconds"]["series"]] == [["256"]]
    assert families["time_to_first_token_seconds"]["series"] == []


def test_before_the_model_is_loaded_nothing_is_said_of_it() -> None:
    document = read(Metrics())
    assert (document["state"], document["model"], document["recent"]) == ("loading", None, [])
    assert document["families"]["running_requests"]["series"] == []
    assert document["families"]["ready"]["series"] == [[[], False]]


def test_a_value_that_is_no_number_is_null(make_metrics: MakeMetrics) -> None:
    now = 0.0
    metrics = make_metrics(lambda: now)
    metrics.snapshot = EngineSnapshot(oldest_waiting_since=-math.inf)
    assert read(metrics)["families"]["oldest_waiting_seconds"]["series"] == [[[], None]]


def test_recent_requests_are_newest_first_and_few(make_metrics: MakeMetrics) -> None:
    now = 100.0
    metrics = make_metrics(lambda: now)
    for prompt_tokens in range(1, MAX_RECENT + 6):
        finish(metrics, prompt_tokens)
    now = 107.0
    recent = read(metrics)["recent"]
    assert [request["prompt_tokens"] for request in recent] == list(range(MAX_RECENT + 5, 5, -1))
    assert recent[0] == {
        "ended": 7.0,
        "reason": "max_tokens",
        "prompt_tokens": MAX_RECENT + 5,
        "cached_tokens": 0,
        "output_tokens": 0,
        "preemptions": 0,
        "queue": 0.25,
        "prefill": 0.5,
        "mean_gap": (0.1 + 0.2) / 2,
        "duration": 1.5,
    }


def test_no_request_is_named(make_metrics: MakeMetrics) -> None:
    metrics = make_metrics()
    finish(metrics, 3)
    assert "secret" not in live_json(metrics)


def test_a_request_that_never_began_has_no_times(make_metrics: MakeMetrics) -> None:
    metrics = make_metrics()
    request = Request("r", [1], SamplingParams(), max_new_tokens=1)
    nothing = Timings(queue=None, prefill=None, decode=None, time_to_first_token=None)
    metrics.observe_finished(FinishReason.QUEUE_TIMEOUT, request, nothing, 0.1)
    (recent,) = read(metrics)["recent"]
    assert (recent["queue"], recent["prefill"], recent["mean_gap"]) == (None, None, None)
