"""Every metric, declared once: name, kind, meaning, labels, buckets. The table of README.md is made from here."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pagestream.server.cost_model import Phase, Term
from pagestream.server.objectives import Objective
from pagestream.server.request import FinishReason

PREFIX = "pagestream_"

CONTEXT_EDGES = tuple(2**k for k in range(8, 17))  # tokens; upper edges, inclusive
CTX = (*map(str, CONTEXT_EDGES), "inf")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 40.96, 163.84)
STAGE_SECONDS = (0.0025, 0.01, 0.04, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 40.96, 163.84)  # fewer: by ctx
RELEASE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.32, 2.56)
GAP_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
MEAN_GAP_SECONDS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.2, 1.0)
TOKENS = tuple(float(2**k) for k in range(18))
NATS = tuple(2.0**k for k in range(-4, 4))
ATTENTION_CTX = (*CTX[:6], "inf")  # of families that are by layer group too
LAYER_GROUPS = ("early", "middle", "late")
BANDS = tuple(map(str, range(16)))

RATIOS = (0.5, 0.75, 0.9, 1.1, 1.5, 3.0)
CHUNK_TOKENS = (8.0, 32.0, 128.0, 512.0, 2048.0)
OVERHEAD_SECONDS = tuple(50e-6 * 4**k for k in range(6))

Kind = Literal["histogram", "counter", "gauge"]
Outcome = Literal["ok", "cancelled", "deadline", "rejected", "error"]
StepMix = Literal["decode", "prefill", "mixed"]
CancelledBy = Literal["client", "deadline", "slow_reader", "shutdown"]
IntegrityKind = Literal["nan", "entropy_range", "sink_lost", "entropy_jump"]
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
    "aborted",
    "engine_fault",
    "unauthenticated",
    "key_limit",
    "key_busy",
    "unsupported",
)

PHASES = get_args(Phase)
OBJECTIVES = get_args(Objective)

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

    @property
    def is_sparse(self) -> bool:
        """Whether a series appears with its first sample: most of those by context or layer group never have one."""
        return "layers" in self.labels or (self.kind == "counter" and "ctx" in self.labels)


def _histogram(
    name: str, meaning: str, edges: tuple[float, ...], *, model: bool = True, **labels: LabelValues
) -> Family:
    return Family("histogram", name, meaning, labels, edges, model)


def _counter(name: str, meaning: str, *, model: bool = True, **labels: LabelValues) -> Family:
    return Family("counter", name, meaning, labels, (), model)


def _gauge(name: str, meaning: str, *, model: bool = True, **labels: LabelValues) -> Family:
    return Family("gauge", name, meaning, labels, (), model)


def _rows(name: str, meaning: str) -> Family:
    return _counter(name, meaning, ctx=ATTENTION_CTX, layers=LAYER_GROUPS)


_FINISHED = tuple(reason.value for reason in FinishReason)
_BOOLS = ("true", "false")
_DECODE_MIX = ("pure", "with_prefill")

FAMILIES = (
    # Requests: each time runs between two of the moments received, first scheduled, first token, last token, end.
    _histogram("time_to_first_token_seconds", "Request received to first delta handed to gRPC", SECONDS, ctx=CTX),
    _histogram("queue_time_seconds", "Request received to first scheduled", STAGE_SECONDS, ctx=CTX),
    _histogram("prefill_time_seconds", "First scheduled to first token", STAGE_SECONDS, ctx=CTX),
    _histogram("inter_token_latency_seconds", "Gap between tokens; ctx at the later token", GAP_SECONDS, ctx=CTX),
    _histogram(
        "time_per_output_token_seconds", "Mean gap of an ended request; ctx at its end", MEAN_GAP_SECONDS, ctx=CTX
    ),
    _histogram("request_duration_seconds", "Request received to its end", SECONDS, outcome=get_args(Outcome)),
    _histogram("request_prompt_tokens", "Prompt tokens of an ended request", TOKENS),
    _histogram("request_output_tokens", "Tokens generated for an ended request", TOKENS),
    _histogram("request_context_tokens", "Prompt and output tokens of an ended request", TOKENS),
    _counter("requests_finished_total", "Admitted requests that ended", reason=_FINISHED),
    _counter("requests_rejected_total", "Requests refused before admission", reason=REJECTION_REASONS),
    _histogram("cancel_release_seconds", "Cancel seen to KV blocks free", RELEASE_SECONDS, by=get_args(CancelledBy)),
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
    # Is it right? What was checked at the start, and what is checked now and then.
    _gauge("selftest_ok", "1 if attention obeyed this law on this device at the start", test=()),
    _gauge("selftest_max_error", "Worst error of that check, as a share of what is allowed", test=()),
    _gauge("selftest_seconds", "Time that all of these checks took"),
    _gauge("canary_logprob", "Log-probability per token of a known answer, at its last run", task=(), ctx=()),
    _gauge("canary_baseline_logprob", "The same at its first run after the start", task=(), ctx=()),
    _counter("canary_runs_total", "Known answers that were scored, or not", result=("ok", "failed", "skipped")),
    # What prompts cost, by the model that is fitted to the steps, and who waits for whom.
    _counter("attention_kernel_seconds_total", "Time in attention; ctx of the step's longest", phase=PHASES, ctx=CTX),
    _counter("attention_kv_bytes_total", "Keys and values it had to read in that time", phase=PHASES, ctx=CTX),
    _histogram("host_overhead_seconds", "Step time beside attention and products with weights", OVERHEAD_SECONDS),
    _histogram("prefill_chunk_tokens", "Tokens that a step read of one prompt", CHUNK_TOKENS),
    _gauge("cost_fit_seconds", "Cost per step (a), row, token (b), token squared (c)", term=get_args(Term)),
    _gauge("cost_fit_lower95_seconds", "Lower end of its 95 % interval", term=get_args(Term)),
    _gauge("cost_fit_upper95_seconds", "Upper end of its 95 % interval", term=get_args(Term)),
    _gauge("cost_fit_samples", "Steps that the fit has seen", phase=PHASES),
    _gauge("cost_fit_max_tokens", "Longest context among them: beyond, it extrapolates", phase=PHASES),
    _gauge("cost_fit_crossover_tokens", "Prompt length b / c; there only if the interval of c excludes 0"),
    _histogram("cost_residual_ratio", "Time of a step over its forecast", RATIOS, phase=PHASES),
    _histogram("ttft_residual_ratio", "Time to first token over its forecast at receipt", RATIOS),
    _gauge("predicted_ttft_seconds", "Forecast for 32 tokens of prompt that arrive now"),
    _gauge(
        "achieved_bandwidth_bytes_per_second", "Bytes a decode needs over their fitted cost", what=("weights", "kv")
    ),
    _counter(
        "stall_seconds_total", "Gaps above the forecast of decodes alone", cause=("prefill", "preemption", "other")
    ),
    _counter("stall_caused_seconds_total", "Those by prefill, by the prompt that caused them", ctx=CTX),
    _counter(
        "slo_requests_total",
        "Ended requests by objective; ctx of the prompt",
        ctx=CTX,
        objective=OBJECTIVES,
        met=_BOOLS,
    ),
    # Attention, of the decoded rows that the server samples (`--attention-every`); a row adds its mean over heads.
    _rows("attention_rows_total", "Rows observed"),
    _rows("attention_entropy_nats_total", "Entropy"),
    _rows("attention_log_context_total", "Logarithm of the context"),
    _rows("attention_sink_mass_total", "Mass on the first 4 tokens"),
    _rows("attention_recent_mass_total", "Mass on the last 64 tokens"),
    _rows("attention_p_max_total", "Largest weight"),
    _rows("attention_rest_rows_total", "Share of heads that leave the first token over 0.001 to others"),
    _rows("attention_entropy_rest_nats_total", "Entropy without the first token, over those heads"),
    _counter(
        "attention_band_mass_total", "Mass at distance 2^band - 1 to 2^(band+1) - 2", band=BANDS, layers=LAYER_GROUPS
    ),
    _counter("attention_sampled_rows_total", "Rows whose pages were observed, one in 16", ctx=ATTENTION_CTX),
    _counter("attention_pages95_total", "Pages that hold 95 % of the mass", ctx=ATTENTION_CTX),
    _counter("attention_head_jsd_nats_total", "Divergence between heads over pages", ctx=ATTENTION_CTX),
    _counter("attention_head_jsd_null_nats_total", "The same with pages of each head shifted", ctx=ATTENTION_CTX),
    _gauge(
        "attention_dilution_exponent", "Slope of entropy on log context; no measure of quality", layers=LAYER_GROUPS
    ),
    _gauge("attention_dilution_samples", "Rows it is of, older ones counting less", layers=LAYER_GROUPS),
    _histogram("output_entropy_nats", "Entropy of the raw logits of tokens that the server samples", NATS),
    _histogram("output_surprisal_nats", "Minus log-probability of those tokens under the raw logits", NATS),
    _counter(
        "integrity_events_total", "Rows whose attention cannot be or is unlike all before", kind=get_args(IntegrityKind)
    ),
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


def ctx_of(tokens: int) -> str:
    """The value of the label `ctx` for so many tokens."""
    return CTX[bisect_left(CONTEXT_EDGES, tokens)]


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
