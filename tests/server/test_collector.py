"""Exposition: what a scrape holds, its size and speed, the parsers that read it, and the README's table."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import get_args

import grpc
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from pagestream.kernels import selftest
from pagestream.model.step import Chunk, SamplingParams, StepPlan
from pagestream.server import errors
from pagestream.server.attention_metrics import AttentionMetrics
from pagestream.server.collector import make_registry
from pagestream.server.cost_model import TERMS
from pagestream.server.events import Timings
from pagestream.server.metric_families import CTX, FAMILIES, OBJECTIVES, PHASES, REJECTION_REASONS
from pagestream.server.metrics import Metrics
from pagestream.server.probes import LENGTHS, Task
from pagestream.server.request import FinishReason, Request
from pagestream.server.snapshot import EngineSnapshot, ServerState
from pagestream.v1 import generation_pb2, insight_pb2, model_pb2, tokenizer_pb2
from tests.support.summaries import make_row, output_of

MakeMetrics = Callable[..., Metrics]

MAX_SERIES = 2000
ONE_OF_EACH_CTX = [2**k for k in range(8, 18)]  # tokens
README = Path(__file__).parents[2] / "README.md"


def scrape(metrics: Metrics) -> dict[str, Metric]:
    text = generate_latest(make_registry(metrics)).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def shown(metrics: Metrics, name: str, label: str) -> set[str]:
    """Values of a label in the exposition of a family."""
    return {sample.labels[label] for sample in scrape(metrics)[f"pagestream_{name}"].samples}


@pytest.fixture
def filled(make_metrics: MakeMetrics) -> Metrics:
    """Every ctx, every enum value and every method with every status code is in use."""
    metrics = make_metrics()
    timings = Timings(queue=0.1, prefill=0.2, decode=0.01, time_to_first_token=0.3, gaps=(0.01,))
    metrics.observe_gaps(ONE_OF_EACH_CTX, [0.01] * len(ONE_OF_EACH_CTX))
    for context in ONE_OF_EACH_CTX:
        metrics.observe_first_token(context, timings)
        metrics.observe_first_delta(context, 0.3)
        request = Request("r", range(context), SamplingParams(), max_new_tokens=1)
        for reason in FinishReason:
            metrics.observe_finished(reason, request, timings, 0.4)
    for rejection in REJECTION_REASONS:
        metrics.observe_rejected(rejection.upper(), 0.001)
    metrics.observe_cancel_release("client", 0.001)
    metrics.observe_cancel_release("deadline", 0.001)
    metrics.observe_cancel_release("shutdown", 0.001)
    metrics.set_reuse(preemptions=1, recomputed_tokens=17, queried_tokens=0, hit_tokens=0, evicted_blocks=0)
    metrics.observe_step(StepPlan((Chunk("r", range(8), 5, 7, 1, (), SamplingParams()),)), 0.02, 0)
    for ctx in CTX:
        for phase in PHASES:
            metrics.book([(f"attention_{what}_total", 2.0, (phase, ctx)) for what in ("kernel_seconds", "kv_bytes")])
        metrics.book([("stall_caused_seconds_total", 0.1, (ctx,))])
        for objective in OBJECTIVES:
            metrics.book([("slo_requests_total", 1, (ctx, objective, met)) for met in ("true", "false")])
    for name in ("cost_fit_seconds", "cost_fit_lower95_seconds", "cost_fit_upper95_seconds"):
        metrics.set_gauges({name: dict.fromkeys([(term,) for term in TERMS], 0.001)})
    rows = [make_row(context, entropy=context**0.1) for context in ONE_OF_EACH_CTX for _ in range(20)]
    AttentionMetrics(metrics).record(rows, [output_of(5)], with_pages=True)
    probes = list(product(get_args(Task), map(str, LENGTHS)))
    metrics.set_gauges({f"canary_{which}": dict.fromkeys(probes, -0.5) for which in ("logprob", "baseline_logprob")})
    laws = [(law,) for law in selftest.TESTS]
    metrics.set_gauges({f"selftest_{what}": dict.fromkeys(laws, 1.0) for what in ("ok", "max_error")})
    metrics.observe_loop_lag(0.001)
    metrics.observe_tokenize(0.001)
    for method in rpc_names():
        for code in grpc.StatusCode:
            metrics.call_started(method)
            metrics.call_handled(method, code.name)
    metrics.state = ServerState.READY
    metrics.snapshot = EngineSnapshot(running_contexts=ONE_OF_EACH_CTX, waiting_contexts=ONE_OF_EACH_CTX)
    return metrics


def rpc_names() -> list[str]:
    services = [
        service
        for module in (generation_pb2, insight_pb2, model_pb2, tokenizer_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    ]
    ours = [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    return [*ours, "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.reflection/Info"]


def test_a_histogram_shows_only_contexts_with_samples(make_metrics: MakeMetrics) -> None:
    metrics = make_metrics()
    assert shown(metrics, "inter_token_latency_seconds", "ctx") == set()
    metrics.observe_gaps([300, 400], [0.01, 0.02])
    assert shown(metrics, "inter_token_latency_seconds", "ctx") == {"512"}


def test_before_the_model_has_a_name_only_the_process_is_shown() -> None:
    metrics = Metrics()
    metrics.observe_rejected(errors.LoadingError.reason, 0.001)
    families = scrape(metrics)
    assert not any("model" in sample.labels for family in families.values() for sample in family.samples)
    assert families["pagestream_ready"].samples[0].value == 0


def test_infos_describe_the_process(make_metrics: MakeMetrics) -> None:
    families = scrape(make_metrics())
    [model] = families["pagestream_model_info"].samples
    [cache] = families["pagestream_kv_config_info"].samples
    assert (model.labels["architecture"], model.labels["max_context"], model.value) == ("llama", "2048", 1)
    assert (cache.labels["block_size"], cache.labels["num_blocks"], cache.labels["dtype"]) == ("16", "100", "fp32")


def test_every_refusal_has_its_label() -> None:
    def subclasses(kind: type[errors.RequestError]) -> set[type[errors.RequestError]]:
        return {kind}.union(*map(subclasses, kind.__subclasses__()))

    assert {kind.reason.lower() for kind in subclasses(errors.RequestError)} == set(REJECTION_REASONS)


def test_openmetrics_parser_accepts_the_exposition(filled: Metrics) -> None:
    text = openmetrics.generate_latest(make_registry(filled)).decode()
    names = {family.name for family in openmetrics_parser.text_string_to_metric_families(text)}
    assert {"pagestream_queue_time_seconds", "pagestream_output_tokens"} <= names


def test_prometheus_client_accepts_the_declarations() -> None:
    """Its own metrics refuse bad names and a histogram and a counter that share a base name."""
    registry = CollectorRegistry()
    for family in FAMILIES:
        kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        kinds[family.kind](f"pagestream_{family.name}", family.meaning, family.label_names, registry=registry)
        assert family.edges == tuple(sorted(set(family.edges)))


def test_series_stay_in_budget_and_a_scrape_is_quick(filled: Metrics) -> None:
    """The whole set with every ctx in use, in time of the processor; 20 ms is the aim, with room for a slow one."""
    registry = make_registry(filled)
    elapsed = []
    for _ in range(5):
        started = time.process_time()
        text = generate_latest(registry).decode()
        elapsed.append(time.process_time() - started)
    families = list(text_string_to_metric_families(text))
    present = {family.name for family in families if family.samples}
    assert {f"pagestream_{family.name}".removesuffix("_total") for family in FAMILIES} <= present
    assert len(shown(filled, "inter_token_latency_seconds", "ctx")) == len(ONE_OF_EACH_CTX)
    assert sum(len(family.samples) for family in families) <= MAX_SERIES
    assert min(elapsed) < 0.1


def test_promtool_accepts_the_exposition(filled: Metrics) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    text = generate_latest(make_registry(filled))
    check = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (check.returncode, check.stderr) == (0, b"")


def readme_rows() -> list[list[str]]:
    table = README.read_text().split("<!-- metrics:begin -->")[1].split("<!-- metrics:end -->")[0]
    _, _, *rows = table.strip().splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_readme_table_equals_the_registry(filled: Metrics) -> None:
    """Name, type, labels with their closed values, and meaning: as scraped, not as declared."""
    exposed = {}
    for family in scrape(filled).values():
        if family.name.startswith("pagestream_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = {key: {s.labels[key] for s in family.samples} for key in family.samples[0].labels if key != "le"}
            exposed[name] = (family.type, family.documentation, labels)
    rows = {name.strip("`"): (kind, labels, meaning) for name, kind, labels, meaning in readme_rows()}
    assert set(rows) == set(exposed)
    for name, (kind, cell, meaning) in rows.items():
        exposed_kind, exposed_meaning, exposed_labels = exposed[name]
        assert (kind, meaning) == (exposed_kind, exposed_meaning)
        labels = [part.partition(": ") for part in cell.split("; ") if part]
        assert {label for label, _, _ in labels} == set(exposed_labels), name
        for label, _, listed in labels:
            if listed:
                assert set(listed.split(", ")) == exposed_labels[label], name


def test_the_module_prints_the_readme_table() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "pagestream.server.metrics"], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() in README.read_text()
