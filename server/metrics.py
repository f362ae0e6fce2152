"""Recording: the calls with which the engine and the services say what happened.

They add to plain counts, all tokens of a step in one call; collector.py turns them into Prometheus families when
somebody scrapes. Any thread may record: the engine's does so per step, the event loop per request and
RPC, the tokeniser pool per prompt. One lock, held for microseconds, keeps counts and sums consistent for the scraper.
`python -m pagestream.server.metrics` prints the table of README.md.
"""

from __future__ import annotations

import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from pagestream.model.step import StepPlan
from pagestream.server.events import Timings
from pagestream.server.histogram import Histogram, HistogramReading
from pagestream.server.metric_families import (
    CONTEXT_EDGES,
    FAMILIES,
    CancelledBy,
    LabelValues,
    Outcome,
    StepMix,
    ctx_of,
    markdown_table,
)
from pagestream.server.objectives import Objectives
from pagestream.server.recent import RecentRequests
from pagestream.server.request import FinishReason, Request
from pagestream.server.snapshot import EngineSnapshot, ServerState, Status

_FAILURES: dict[FinishReason, Outcome] = {  # every other reason is an answer
    FinishReason.CANCELLED: "cancelled",
    FinishReason.DEADLINE: "deadline",
    FinishReason.QUEUE_TIMEOUT: "rejected",
    FinishReason.SLOW_READER: "cancelled",  # its client's doing
    FinishReason.ERROR: "error",
    FinishReason.SHUTDOWN: "error",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """A copy of all that was recorded, taken at one moment, by family."""

    model: str | None
    histograms: dict[str, HistogramReading]
    values: dict[str, dict[LabelValues, float]]  # counters and gauges


class Metrics:
    """All metrics of one process, which serves one model. Times are seconds; `clock` is the one the engine reads.

    `state` and `snapshot` are replaced as a whole by whoever knows better: the application and the engine, which does
    so after every step and also when its last request has gone.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        objectives: Objectives = Objectives(),  # noqa: B008 - frozen
    ) -> None:
        self.state = ServerState.LOADING
        self.snapshot = EngineSnapshot()
        self.recent = RecentRequests(clock)
        self._clock = clock
        self._objectives = objectives
        self._model: str | None = None
        self._decode_contexts: Sequence[int] = ()
        self._lock = threading.Lock()
        self._histograms = {family.name: Histogram(family) for family in FAMILIES if family.kind == "histogram"}
        self._values = {
            family.name: dict.fromkeys(() if family.is_sparse else family.series, 0.0)
            for family in FAMILIES
            if family.kind != "histogram"
        }
        self._values["build_info"] = {(_version(),): 1}

    def set_model(
        self,
        name: str,
        *,
        load_seconds: float,
        architecture: str,
        dtype: str,
        device: str,
        max_context: int,
        block_size: int,
        num_blocks: int,
        kv_dtype: str,
    ) -> None:
        """Names the model that all families of requests and tokens are about; they are not shown before."""
        with self._lock:
            self._values["model_load_seconds"] = {(): load_seconds}
            self._values["model_info"] = {(architecture, dtype, device, str(max_context)): 1}
            self._values["kv_config_info"] = {(str(block_size), str(num_blocks), kv_dtype): 1}
            self._model = name

    # ---- called by the engine

    def observe_step(self, plan: StepPlan, seconds: float, num_accepted: int) -> None:
        """A step has run, and kept so many of the proposed tokens. What is not decode counts as prompt."""
        decodes = [chunk for chunk in plan.chunks if chunk.is_decode]
        contexts = [chunk.start + 1 for chunk in decodes]
        decode_tokens = len(decodes) + num_accepted
        num_proposed = sum(len(chunk.proposed) for chunk in decodes)
        prompt_tokens = plan.num_tokens - len(decodes) - num_proposed
        mix: StepMix = "prefill" if not decode_tokens else "mixed" if prompt_tokens else "decode"
        with self._lock:
            self._decode_contexts = contexts
            self._observe("step_seconds", seconds, mix)
            self._count("prompt_tokens_total", prompt_tokens, "computed")
            if decode_tokens:
                company = "with_prefill" if prompt_tokens else "pure"
                self._count("decode_step_seconds_total", seconds, company)
                self._count("decode_step_tokens_total", decode_tokens, company)
            if num_proposed:
                self._count("speculated_tokens_total", num_accepted, "accepted")
                self._count("speculated_tokens_total", num_proposed - num_accepted, "rejected")

    def observe_gaps(self, contexts: Sequence[int], gaps: Sequence[float]) -> None:
        """All tokens of a step but the first ones of their streams: context at the token, time since the one before."""
        with self._lock:
            self._histograms["inter_token_latency_seconds"].add(_ctx_rows(contexts), gaps)
            self._count("output_tokens_total", len(gaps))

    def observe_first_token(self, prompt_tokens: int, timings: Timings) -> None:
        with self._lock:
            for name, seconds in (("queue_time_seconds", timings.queue), ("prefill_time_seconds", timings.prefill)):
                if seconds is not None:
                    self._observe(name, seconds, ctx_of(prompt_tokens))
            if timings.predicted_time_to_first_token and timings.time_to_first_token is not None:
                ratio = timings.time_to_first_token / timings.predicted_time_to_first_token
                self._observe("ttft_residual_ratio", ratio)
            self._count("output_tokens_total", 1)

    def observe_finished(self, reason: FinishReason, request: Request, timings: Timings, seconds: float) -> None:
        """An admitted request ended, `seconds` after it was received."""
        self.recent.add(reason, request, timings, seconds)
        with self._lock:
            self._count("requests_finished_total", 1, reason.value)
            self._observe("request_duration_seconds", seconds, _FAILURES.get(reason, "ok"))
            self._observe("request_prompt_tokens", request.num_prompt_tokens)
            self._observe("request_output_tokens", request.num_output_tokens)
            self._observe("request_context_tokens", request.num_tokens)
            if timings.gaps:
                mean = sum(timings.gaps) / len(timings.gaps)
                self._observe("time_per_output_token_seconds", mean, ctx_of(request.num_tokens))
            for objective, met in self._objectives.judge(reason, timings, seconds):
                labels = ctx_of(request.num_prompt_tokens), objective, str(met).lower()
                self._count("slo_requests_total", 1, *labels)

    def book(
        self,
        counts: Iterable[tuple[str, float, LabelValues]] = (),
        samples: Iterable[tuple[str, float, LabelValues]] = (),
    ) -> None:
        """Family, amount and labels: what is added to counters, and what histograms are to hold; at one moment."""
        with self._lock:
            for name, amount, labels in counts:
                self._count(name, amount, *labels)
            for name, value, labels in samples:
                self._observe(name, value, *labels)

    def set_gauges(self, gauges: Mapping[str, dict[LabelValues, float]]) -> None:
        """Family to its series: those that it has from now on."""
        with self._lock:
            self._values.update(gauges)

    def observe_cancel_release(self, by: CancelledBy, seconds: float) -> None:
        with self._lock:
            self._observe("cancel_release_seconds", seconds, by)

    def observe_pause(self, seconds: float) -> None:
        """A request was out of the batch for so long because its reader was behind."""
        with self._lock:
            self._count("stream_backpressure_seconds_total", seconds)

    def set_reuse(
        self, *, preemptions: int, recomputed_tokens: int, queried_tokens: int, hit_tokens: int, evicted_blocks: int
    ) -> None:
        """Totals since the start: what had to be computed again, and what need not be."""
        with self._lock:
            self._values["preemptions_total"]["out_of_blocks",] = preemptions
            self._values["recomputed_tokens_total"][()] = recomputed_tokens
            self._values["prefix_cache_queried_tokens_total"][()] = queried_tokens
            self._values["prefix_cache_hit_tokens_total"][()] = hit_tokens
            self._values["prompt_tokens_total"]["cached",] = hit_tokens
            self._values["prefix_cache_evicted_blocks_total"][()] = evicted_blocks

    # ---- called by the services

    def observe_first_delta(self, prompt_tokens: int, seconds: float) -> None:
        """Received to the first delta handed to gRPC: the time to first token as a client sees it, less the network."""
        with self._lock:
            self._observe("time_to_first_token_seconds", seconds, ctx_of(prompt_tokens))

    def observe_rejected(self, reason: str, seconds: float) -> None:
        """A request was refused before admission; `reason` is that of errors.py."""
        with self._lock:
            self._count("requests_rejected_total", 1, reason.lower())
            self._observe("request_duration_seconds", seconds, "rejected")

    def call_started(self, method: str) -> None:
        """An RPC began. Only methods that exist may come here: each costs series."""
        with self._lock:
            self._count("grpc_server_started_total", 1, method)
            self._count("grpc_active_streams", 1, method)

    def call_handled(self, method: str, code: str) -> None:
        """An RPC ended; `code` is the name of its grpc.StatusCode."""
        with self._lock:
            self._count("grpc_server_handled_total", 1, method, code)
            self._count("grpc_active_streams", -1, method)

    def observe_loop_lag(self, seconds: float) -> None:
        with self._lock:
            self._observe("event_loop_lag_seconds", seconds)

    def observe_tokenize(self, seconds: float) -> None:
        with self._lock:
            self._observe("tokenize_seconds", seconds)

    # ---- called by the HTTP port

    def status(self) -> Status:
        snapshot = self.snapshot
        running, waiting = len(snapshot.running_contexts), len(snapshot.waiting_contexts)
        return Status(self.state, self._model, running, waiting, snapshot.kv_cache_usage_ratio)

    def read(self) -> Reading:
        with self._lock:
            histograms = {name: histogram.read() for name, histogram in self._histograms.items()}
            values = {name: dict(series) for name, series in self._values.items()}
            snapshot = self.snapshot
            decoding = self._decode_contexts if snapshot.running_contexts else ()  # the last step was the last one
        values |= snapshot.gauges(self._clock())
        values["batch_context_tokens"] = {(): sum(decoding)}
        values["batch_context_tokens_max"] = {(): max(decoding, default=0)}
        values["ready"] = {(): self.state is ServerState.READY}
        values["draining"] = {(): self.state is ServerState.DRAINING}
        return Reading(self._model, histograms, values)

    def _observe(self, name: str, value: float, *labels: str) -> None:
        histogram = self._histograms[name]
        histogram.add((histogram.rows[labels],), (value,))

    def _count(self, name: str, amount: float, *labels: str) -> None:
        series = self._values[name]
        series[labels] = series.get(labels, 0.0) + amount


def _ctx_rows(contexts: Sequence[int]) -> list[int]:
    """Index into CTX of each context length."""
    return [bisect_left(CONTEXT_EDGES, context) for context in contexts]


def _version() -> str:
    try:
        return metadata.version("pagestream")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


if __name__ == "__main__":
    sys.stdout.write(markdown_table())
