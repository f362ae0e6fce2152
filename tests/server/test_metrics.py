"""Recording: arithmetic against prometheus_client's own metrics, live state, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pagestream.model.step import Chunk, SamplingParams, StepPlan
from pagestream.server import errors
from pagestream.server.collector import make_registry
from pagestream.server.events import Timings
from pagestream.server.metrics import Metrics
from pagestream.server.request import FinishReason, Request
from pagestream.server.snapshot import EngineSnapshot, ServerState

MakeMetrics = Callable[..., Metrics]

# As in the specification of the metrics, written out again.
CTX_UPPER = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
T = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 40.96, 163.84)
STAGE = (0.0025, 0.01, 0.04, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 40.96, 163.84)
G = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
MEAN_G = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.2, 1.0)
TOKEN_COUNTS = [2**k for k in range(18)]

contexts = st.one_of(st.integers(1, 200_000), st.sampled_from([n + d for n in CTX_UPPER for d in (-1, 0, 1)]))
seconds = st.one_of(st.floats(0, 300), st.sampled_from([*T, *G]))


def ctx_of(context: int) -> str:
    return next((str(upper) for upper in CTX_UPPER if context <= upper), "inf")


def make_request(prompt_tokens: int, output_tokens: int = 0) -> Request:
    request = Request("r", range(prompt_tokens), SamplingParams(), max_new_tokens=10**6)
    request.tokens.extend([0] * output_tokens)
    return request


def make_timings(*, queue: float | None = None, prefill: float | None = None, gaps: tuple[float, ...] = ()) -> Timings:
    return Timings(queue=queue, prefill=prefill, decode=sum(gaps), time_to_first_token=None, gaps=gaps)


def make_chunk(prompt_tokens: int, start: int, length: int, known_tokens: int | None = None) -> Chunk:
    known = prompt_tokens if known_tokens is None else known_tokens
    return Chunk("r", range(known), prompt_tokens, start, length, (), SamplingParams())


def scrape(metrics: Metrics) -> dict[str, Metric]:
    text = generate_latest(make_registry(metrics)).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(metrics: Metrics, name: str, label: str | None = None) -> dict[str, float]:
    """Samples of one name in an exposition, by the value of one label."""
    samples = (sample for family in scrape(metrics).values() for sample in family.samples)
    return {s.labels[label] if label else "": s.value for s in samples if s.name == f"pagestream_{name}"}


def sample_values(family: Metric) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {(s.name, frozenset(s.labels.items())): s.value for s in family.samples}


def assert_exposes_the_same(metrics: Metrics, oracle: CollectorRegistry) -> None:
    """Our exposition of the oracle's families equals that of prometheus_client's own metrics."""
    ours = scrape(metrics)
    for family in text_string_to_metric_families(generate_latest(oracle).decode()):
        if not family.name.endswith("_created"):
            assert sample_values(ours[family.name]) == pytest.approx(sample_values(family), rel=1e-12, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(contexts, seconds), max_size=8), max_size=8))
def test_gaps_equal_prometheus_own_histogram(make_metrics: MakeMetrics, steps: list[list[tuple[int, float]]]) -> None:
    """Vectorised recording gives, bucket by bucket, what one observe() per token gives."""
    metrics, registry = make_metrics(), CollectorRegistry()
    name = "pagestream_inter_token_latency_seconds"
    oracle = Histogram(name, "h", ["model", "ctx"], registry=registry, buckets=G)
    for step in steps:
        metrics.observe_gaps([context for context, _ in step], [gap for _, gap in step])
        for context, gap in step:
            oracle.labels("m", ctx_of(context)).observe(gap)
    assert_exposes_the_same(metrics, registry)
    assert values(metrics, "output_tokens_total") == {"": sum(map(len, steps))}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(contexts, seconds, seconds), max_size=12))
def test_request_times_equal_prometheus_own_histogram(
    make_metrics: MakeMetrics, requests: list[tuple[int, float, float]]
) -> None:
    metrics, registry = make_metrics(), CollectorRegistry()
    buckets = {"queue_time": STAGE, "prefill_time": STAGE, "time_to_first_token": T}
    oracles = [
        Histogram(f"pagestream_{name}_seconds", "h", ["model", "ctx"], registry=registry, buckets=edges)
        for name, edges in buckets.items()
    ]
    for prompt_tokens, queue, prefill in requests:
        metrics.observe_first_token(prompt_tokens, make_timings(queue=queue, prefill=prefill))
        metrics.observe_first_delta(prompt_tokens, queue + prefill)
        for oracle, value in zip(oracles, (queue, prefill, queue + prefill), strict=True):
            oracle.labels("m", ctx_of(prompt_tokens)).observe(value)
    assert_exposes_the_same(metrics, registry)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(FinishReason)), st.integers(1, 5000), st.integers(0, 300)), max_size=8))
def test_finished_requests_equal_prometheus_own_metrics(
    make_metrics: MakeMetrics, ends: list[tuple[FinishReason, int, int]]
) -> None:
    metrics, registry = make_metrics(), CollectorRegistry()
    prefix = "pagestream_request_"
    prompt = Histogram(f"{prefix}prompt_tokens", "h", ["model"], registry=registry, buckets=TOKEN_COUNTS)
    output = Histogram(f"{prefix}output_tokens", "h", ["model"], registry=registry, buckets=TOKEN_COUNTS)
    whole = Histogram(f"{prefix}context_tokens", "h", ["model"], registry=registry, buckets=TOKEN_COUNTS)
    mean = Histogram(
        "pagestream_time_per_output_token_seconds", "h", ["model", "ctx"], registry=registry, buckets=MEAN_G
    )
    finished = Counter("pagestream_requests_finished", "h", ["model", "reason"], registry=registry)
    duration = Histogram(f"{prefix}duration_seconds", "h", ["model", "outcome"], registry=registry, buckets=T)
    for oracle in (prompt, output, whole):
        oracle.labels("m")
    for reason in FinishReason:
        finished.labels("m", reason.value)
    for outcome in ("ok", "cancelled", "deadline", "rejected", "error"):
        duration.labels("m", outcome)
    outcome_of_failure = {"cancelled": "cancelled", "deadline": "deadline", "error": "error", "shutdown": "error"}
    outcome_of_failure |= {"slow_reader": "cancelled", "queue_timeout": "rejected"}
    for reason, prompt_tokens, output_tokens in ends:
        gaps = tuple(0.001 * (k % 7) for k in range(output_tokens - 1))
        metrics.observe_finished(reason, make_request(prompt_tokens, output_tokens), make_timings(gaps=gaps), 0.3)
        prompt.labels("m").observe(prompt_tokens)
        output.labels("m").observe(output_tokens)
        whole.labels("m").observe(prompt_tokens + output_tokens)
        finished.labels("m", reason.value).inc()
        duration.labels("m", outcome_of_failure.get(reason.value, "ok")).observe(0.3)
        if output_tokens > 1:
            mean.labels("m", ctx_of(prompt_tokens + output_tokens)).observe(sum(gaps) / (output_tokens - 1))
    assert_exposes_the_same(metrics, registry)


def test_steps_are_told_apart_by_what_they_compute(make_metrics: MakeMetrics) -> None:
    metrics = make_metrics()
    decodes = (make_chunk(5, 7, 1, 8), make_chunk(300, 400, 1, 401))
    prompts = (make_chunk(50, 0, 20), make_chunk(5, 4, 1))  # the second: the last token of a prompt is no decode
    metrics.observe_step(StepPlan(decodes), 0.010, 0)
    metrics.observe_step(StepPlan(prompts), 0.020, 0)
    metrics.observe_step(StepPlan((*decodes, *prompts)), 0.040, 0)
    assert values(metrics, "step_seconds_count", "mix") == {"decode": 1, "prefill": 1, "mixed": 1}
    assert values(metrics, "step_seconds_sum", "mix") == {"decode": 0.010, "prefill": 0.020, "mixed": 0.040}
    assert values(metrics, "decode_step_seconds_total", "mix") == {"pure": 0.010, "with_prefill": 0.040}
    assert values(metrics, "decode_step_tokens_total", "mix") == {"pure": 2, "with_prefill": 2}
    assert values(metrics, "prompt_tokens_total", "source") == {"computed": 42, "cached": 0}


def test_batch_context_is_that_of_the_last_step_and_zero_when_idle(make_metrics: MakeMetrics) -> None:
    metrics = make_metrics()
    metrics.observe_step(StepPlan((make_chunk(5, 7, 1, 8), make_chunk(300, 400, 1, 401), make_chunk(9, 0, 9))), 0.01, 0)
    metrics.snapshot = EngineSnapshot(running_contexts=(8, 401, 9))
    assert values(metrics, "batch_context_tokens") == {"": 8 + 401}
    assert values(metrics, "batch_context_tokens_max") == {"": 401}
    metrics.snapshot = EngineSnapshot()
    assert values(metrics, "batch_context_tokens_max") == {"": 0}


def test_refusals_count_as_rejected_requests_with_a_duration(make_metrics: MakeMetrics) -> None:
    metrics = make_metrics()
    metrics.observe_rejected(errors.QueueFullError.reason, 0.002)
    metrics.observe_rejected(errors.QueueFullError.reason, 0.002)
    assert values(metrics, "requests_rejected_total", "reason")["queue_full"] == 2
    assert values(metrics, "request_duration_seconds_count", "outcome")["rejected"] == 2


def test_totals_of_reuse_are_the_schedulers(make_metrics: MakeMetrics) -> None:
    metrics = make_metrics()
    reuse = {"queried_tokens": 50, "hit_tokens": 30, "evicted_blocks": 4}
    metrics.set_reuse(preemptions=1, recomputed_tokens=100, **reuse)
    metrics.set_reuse(preemptions=2, recomputed_tokens=120, **reuse)
    assert values(metrics, "preemptions_total", "reason") == {"out_of_blocks": 2}
    assert values(metrics, "recomputed_tokens_total") == {"": 120}
    assert values(metrics, "prefix_cache_queried_tokens_total") == {"": 50}
    assert values(metrics, "prefix_cache_hit_tokens_total") == {"": 30}
    assert values(metrics, "prompt_tokens_total", "source")["cached"] == 30
    assert values(metrics, "prefix_cache_evicted_blocks_total") == {"": 4}


def test_active_streams_are_started_minus_handled(make_metrics: MakeMetrics) -> None:
    metrics = make_metrics()
    for _ in range(3):
        metrics.call_started("/s/M")
    metrics.call_handled("/s/M", "OK")
    assert values(metrics, "grpc_server_started_total", "method") == {"/s/M": 3}
    assert values(metrics, "grpc_server_handled_total", "code") == {"OK": 1}
    assert values(metrics, "grpc_active_streams", "method") == {"/s/M": 2}


def test_threads_lose_nothing_and_every_scrape_is_consistent(make_metrics: MakeMetrics) -> None:
    """Four writers and a scraper: no count is lost, and a scrape never sees a token without its bucket."""
    metrics, per_thread = make_metrics(), 1500

    def write() -> None:
        for _ in range(per_thread):
            metrics.observe_gaps([100, 5000], [0.004, 0.2])

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        reading = metrics.read()
        gaps = reading.histograms["inter_token_latency_seconds"]
        assert gaps.counts[:, -1].sum() == reading.values["output_tokens_total"][()]
        assert gaps.sums.sum() == pytest.approx(gaps.counts[:, -1].sum() / 2 * 0.204)
    for thread in threads:
        thread.join()
    assert values(metrics, "output_tokens_total") == {"": 4 * per_thread * 2}


def test_live_state_is_counted_by_context(make_metrics: MakeMetrics) -> None:
    metrics = make_metrics()
    metrics.snapshot = EngineSnapshot(
        running_contexts=(1, 256, 257, 70_000), waiting_contexts=(513,), waiting_prompt_tokens=513,
        free_blocks=5, active_blocks=3, cached_blocks=2, leaked_blocks=1,
    )  # fmt: skip
    running = values(metrics, "running_requests", "ctx")
    assert {ctx: count for ctx, count in running.items() if count} == {"256": 2, "512": 1, "inf": 1}
    assert set(running) == {*map(str, CTX_UPPER), "inf"}
    assert values(metrics, "waiting_requests", "ctx")["1024"] == 1
    assert values(metrics, "waiting_prompt_tokens") == {"": 513}
    assert values(metrics, "kv_blocks", "state") == {"free": 5, "active": 3, "cached": 2}
    assert values(metrics, "kv_cache_usage_ratio") == {"": 0.3}
    assert values(metrics, "kv_leaked_blocks") == {"": 1}


def test_the_oldest_waiting_request_ages_while_the_engine_hangs(make_metrics: MakeMetrics) -> None:
    now = 100.0
    metrics = make_metrics(lambda: now)
    metrics.snapshot = EngineSnapshot(waiting_contexts=(5,), oldest_waiting_since=99.0)
    assert values(metrics, "oldest_waiting_seconds") == {"": 1.0}
    now = 142.0
    assert values(metrics, "oldest_waiting_seconds") == {"": 43.0}


@pytest.mark.parametrize(
    ("state", "ready", "draining"),
    [(ServerState.LOADING, 0, 0), (ServerState.READY, 1, 0), (ServerState.DRAINING, 0, 1), (ServerState.FAILED, 0, 0)],
)
def test_state_gauges(make_metrics: MakeMetrics, state: ServerState, ready: int, draining: int) -> None:
    metrics = make_metrics()
    metrics.state = state
    assert (values(metrics, "ready"), values(metrics, "draining")) == ({"": ready}, {"": draining})
