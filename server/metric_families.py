"""Every metric, declared once: name, kind, meaning, labels, buckets. The table of README.md is made from here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pagestream.server.request import FinishReason

PREFIX = "pagestream_"

CONTEXT_EDGES = tuple(2**k for k in range(8, 17))  # tokens; upper edges, inclusive
CTX = (*map(str, CONTEXT_EDGES), "inf")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 40.96, 163.84)
GAP_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
TOKENS = tuple(float(2**k) for k in range(18))

Kind = Literal["histogram", "counter", "gauge"]
Outcome = Literal["ok", "cancelled", "deadline", "rejected", "error"]
StepMix = Literal["decode", "prefill", "mixed"]
CancelledBy = Literal["client", "deadline", "slow_reader", "shutdown"]
REJECTION_REASONS = (  # those of errors.py, in lower case
    "invalid_field",
    "prompt_exceeds_model_context",
    "prompt_exceeds_kv_capacity",
    "queue_full",
    "queue_timeout",
    "slow_reader",
    "loading",
    "draining",
    "deadline",
    "unknown_model",
    "no_chat_template",
    "duplicate_request_id",
    "engine_fault",
    "unauthenticated",
    "key_limit",
    "key_busy",
)

LabelValues = tuple[str, ...]  # of one series, in the order of Family.labels


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. `labels` maps each name but `model` to its closed set of values, () if known only at run time."""

    kind: Kind
    name: str  # without the prefix
    meaning: str
    labels: Mapping[str, LabelValues]
    edges: tuple[float, ...]  # of a histogram's buckets, inclusive, without the last, infinite one
    per_model: bool  # has the label `model`

    @property
    def label_names(self) -> tuple[str, ...]:
        return (("model",) if self.per_model else ()) + tuple(self.labels)

    @property
    def series(self) -> list[LabelValues]:
        """The series known in advance; none if a label's values are not."""
        return list(itertools.product(*self.labels.values()))


def _histogram(
    name: str, meaning: str, edges: tuple[float, ...], *, model: bool = True, **labels: LabelValues
) -> Family:
    return Family("histogram", name, meaning, labels, edges, model)


def _counter(name: str, meaning: str, *, model: bool = True, **labels: LabelValues) -> Family:
    return Family("counter", name, meaning, labels, (), model)


def _gauge(name: str, meaning: str, *, model: bool = True, **labels: LabelValues) -> Family:
    return Family("gauge", name, meaning, labels, (), model)


_FINISHED = tuple(reason.value for reason in FinishReason)
_DECODE_MIX = ("pure", "with_prefill")

FAMILIES = (
    # Requests: each time runs between two of the moments received, first scheduled, first token, last token, end.
    _histogram("time_to_first_token_seconds", "Request received to first delta handed to gRPC", SECONDS, ctx=CTX),
    _histogram("queue_time_seconds", "Request received to first scheduled", SECONDS, ctx=CTX),
    _histogram("prefill_time_seconds", "First scheduled to first token", SECONDS, ctx=CTX),
    _histogram("inter_token_latency_seconds", "Gap between tokens; ctx at the later token", GAP_SECONDS, ctx=CTX),
    _histogram("time_per_output_token_seconds", "Mean gap of an ended request; ctx at its end", GAP_SECONDS, ctx=CTX),
    _histogram("request_duration_seconds", "Request received to its end", SECONDS, outcome=get_args(Outcome)),
    _histogram("request_prompt_tokens", "Prompt tokens of an ended request", TOKENS),
    _histogram("request_output_tokens", "Tokens generated for an ended request", TOKENS),
    _histogram("request_context_tokens", "Prompt and output tokens of an ended request", TOKENS),
    _counter("requests_finished_total", "Admitted requests that ended", reason=_FINISHED),
    _counter("requests_rejected_total", "Requests refused before admission", reason=REJECTION_REASONS),
    _histogram("cancel_release_seconds", "Cancel seen to KV blocks free", SECONDS, by=get_args(CancelledBy)),
    # Load, as of the last step.
    _gauge("running_requests", "Requests in the batch, by their context now", ctx=CTX),
    _gauge("waiting_requests", "Requests in the queue, by their context now", ctx=CTX),
    _gauge("streams_paused", "Requests out of the batch because their readers are behind"),
    _counter("stream_backpressure_seconds_total", "Time that requests were paused, when each pause ends"),
    _gauge("waiting_prompt_tokens", "Prompt tokens in the queue"),
    _gauge("oldest_waiting_seconds", "Time in the queue of the request longest there"),
    _gauge("batch_context_tokens", "Sum of the contexts decoded in the last step"),
    _gauge("batch_context_tokens_max", "Longest context decoded in the last step"),
    _gauge("kv_blocks", "KV blocks; the states add up to the pool", state=("free", "active", "cached")),
    _gauge("kv_cache_usage_ratio", "Active KV blocks over all, 0 to 1"),
    _gauge("kv_leaked_blocks", "KV blocks that nobody owns; must be 0"),
    # Steps and tokens.
    _histogram("step_seconds", "Wall time of an engine step", GAP_SECONDS, mix=get_args(StepMix)),
    _counter("decode_step_seconds_total", "Wall time of steps that decode, alone or beside prompts", mix=_DECODE_MIX),
    _counter("decode_step_tokens_total", "Tokens decoded in those steps", mix=_DECODE_MIX),
    _counter(
        "prompt_tokens_total", "Tokens computed in prompt chunks, or found in cache", source=("computed", "cached")
    ),
    _counter("output_tokens_total", "Tokens generated"),
    _counter("speculated_tokens_total", "Tokens proposed by prompt lookup", result=("accepted", "rejected")),
    _counter("preemptions_total", "Running requests sent back to the queue", reason=("out_of_blocks",)),
    _counter("recomputed_tokens_total", "Tokens computed again after a preemption or a pause"),
    _counter("prefix_cache_queried_tokens_total", "Prompt tokens looked up in the prefix cache, once per request"),
    _counter("prefix_cache_hit_tokens_total", "Prompt tokens found there"),
    _counter("prefix_cache_evicted_blocks_total", "Cached KV blocks that were needed for something else"),
    # The process.
    _counter("grpc_server_started_total", "RPCs begun", model=False, method=()),
    _counter("grpc_server_handled_total", "RPCs ended, by status code", model=False, method=(), code=()),
    _gauge("grpc_active_streams", "RPCs in progress", model=False, method=()),
    _histogram("event_loop_lag_seconds", "How late the event loop runs a timer", SECONDS, model=False),
    _histogram("tokenize_seconds", "Time to turn one prompt into tokens", SECONDS, model=False),
    _gauge("ready", "1 while requests are admitted", model=False),
    _gauge("draining", "1 while live requests finish and new ones are refused", model=False),
    _gauge("model_load_seconds", "Start of loading to ready"),
    _gauge("build_info", "1; what software runs", model=False, version=()),
    _gauge("model_info", "1; what model is served", architecture=(), dtype=(), device=(), max_context=()),
    _gauge("kv_config_info", "1; the shape of the KV pool", block_size=(), num_blocks=(), dtype=()),
)


def metrics_table() -> list[tuple[str, str, str, str]]:
    """Rows of (name, type, labels, meaning), the labels as `model; ctx; mix: decode, prefill, mixed`."""
    return [(PREFIX + family.name, family.kind, _labels_cell(family), family.meaning) for family in FAMILIES]


def _labels_cell(family: Family) -> str:
    def label(name: str) -> str:
        values = family.labels.get(name, ())
        return f"{name}: {', '.join(values)}" if values and values != CTX else name

    return "; ".join(map(label, family.label_names))


def markdown_table() -> str:
    rows: list[tuple[str, ...]] = [("Name", "Type", "Labels", "Meaning"), ("---",) * 4]
    rows += [(f"`{name}`", *rest) for name, *rest in metrics_table()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
