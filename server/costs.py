"""What the engine tells the cost model, the ledger and their metrics, and what it asks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from pagestream.model.step import StepPlan, StepResult
from pagestream.server.block_pool import BlockPool
from pagestream.server.contained import contained
from pagestream.server.cost_model import Work, work_of
from pagestream.server.forecast import Estimate, Forecast
from pagestream.server.job import Job
from pagestream.server.ledger import NANOSECONDS, Ledger, PromptChunk, Stalls, TokenOf
from pagestream.server.metric_families import LabelValues, ctx_of
from pagestream.server.metrics import Metrics
from pagestream.server.pace import MIN_PROMPT_TOKENS, Pace
from pagestream.server.scheduler import Advance, Scheduler

SHORT_PROMPT = 32  # tokens, whose time to a first token is a metric
_EXPORT_SECONDS = 1.0
_REST = 8  # so many steps are shown when work ends, and not only with those to come
_USUAL_MEMORY = 0.95

Records = list[tuple[str, float, LabelValues]]


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a decode step must read from memory, in bytes; 0 is not known."""

    weights: int = 0
    kv_per_token: int = 0


class Costs:
    """Used by the engine's thread alone. Times are seconds on the engine's clock."""

    def __init__(
        self,
        pace: Pace,
        pool: BlockPool,
        scheduler: Scheduler,
        metrics: Metrics,
        footprint: Footprint,
        clock: Callable[[], float],
    ) -> None:
        self._pace = pace
        self._model = pace.model
        self._scheduler = scheduler
        self._metrics = metrics
        self._footprint = footprint
        self._clock = clock
        self._forecast = Forecast(pace, scheduler, pool)
        self._ledger = Ledger(self._model)
        self._answer_tokens = 64.0  # of a usual answer
        self._prompt_tokens = float(scheduler.token_budget)  # of a usual prompt
        self._seconds_per_token = 0.0  # of a usual prompt, as of the latest that was read
        self._step: tuple[Work, int] | None = None  # the latest, and the longest context in it
        self._next_export = 0.0
        self._unexported = 0  # steps
        self._export()

    @contained((0.0, 0.0))
    def backlog(self) -> tuple[float, float]:
        """Seconds until what there is to read is read, and seconds for each token that would wait, too."""
        return self._forecast.backlog(self._answer_tokens) if self._has_prompts else 0.0, self._seconds_per_token

    @contained(cast("int | None", MIN_PROMPT_TOKENS))
    def prompt_limit(self) -> int | None:
        """How many prompt tokens the next step may read; not worked out where there are none to read."""
        return self._pace.prompt_tokens(self._scheduler.running) if self._has_prompts else None

    @property
    def _has_prompts(self) -> bool:
        """Whether there are any to read."""
        running = self._scheduler.running
        return bool(self._scheduler.num_waiting) or any(request.num_uncomputed > 1 for request in running)

    def estimate(self, prompt: Sequence[int], tenant: str) -> Estimate:
        """Of a prompt that is sent when this is known, so it is not in the step that is about to begin."""
        return self._forecast.estimate(prompt, tenant, self._answer_tokens, self._forecast.next_step())

    @contained(None)
    def predict(self, job: Job) -> None:
        """Before it is admitted: tells it when its first token will come, counted from its receipt."""
        request = job.request
        first = self._forecast.estimate(request.tokens, request.tenant, self._answer_tokens).first_token
        if first is not None:
            job.predicted_first_token = self._clock() - job.received + first

    @contained(None)
    def committed(
        self,
        plan: StepPlan,
        result: StepResult,
        advances: Sequence[Advance],
        jobs: Mapping[str, Job],
        started: float,
        now: float,
    ) -> None:
        """A step has run; its tokens are not in the jobs yet."""
        work = work_of(plan.chunks)
        # Rows with a given token cost several times what those of a prompt do.
        is_scoring = any(chunk.given and not chunk.is_prefill for chunk in plan.chunks)
        self._step = None if is_scoring else (work, max(chunk.end for chunk in plan.chunks))
        tokens = [_token_of(jobs[advance.request.request_id], now) for advance in advances if advance.sampled]
        chunks = [
            PromptChunk(job.ledger, chunk.num_prompt_tokens, work_of((chunk,)))
            for chunk in plan.chunks
            if not chunk.is_decode and (job := jobs.get(chunk.request_id)) is not None
        ]
        stalls = self._ledger.charge(work, tokens, chunks)
        counts = _stall_counts(stalls)
        samples: Records = [("prefill_chunk_tokens", chunk.work.tokens, ()) for chunk in chunks]
        if result.seconds is not None:
            counts += self._kernel_counts(plan, work, result.seconds[0])
            samples.append(("host_overhead_seconds", max(now - started - sum(result.seconds), 0.0), ()))
        self._metrics.book(counts, samples)
        for advance in advances:
            if advance.request.is_finished:
                request = advance.request
                self._answer_tokens += (1 - _USUAL_MEMORY) * (request.num_output_tokens - self._answer_tokens)
                self._prompt_tokens += (1 - _USUAL_MEMORY) * (request.num_prompt_tokens - self._prompt_tokens)

    @contained(None)
    def end_of_turn(self, seconds: float) -> None:
        """A turn of the engine took so long, waiting for work left out."""
        if self._step is not None:
            (work, longest), self._step = self._step, None
            ratio = self._model.observe(work, longest, seconds)
            if ratio is not None:
                self._metrics.book((), [("cost_residual_ratio", ratio, (work.phase,))])
            if work.tokens:
                self._seconds_per_token = self._forecast.seconds_per_token(round(self._prompt_tokens))
            self._unexported += 1
        at_rest = not self._scheduler.has_work
        if self._unexported and (self._clock() >= self._next_export or (self._unexported >= _REST and at_rest)):
            self._export()
        elif at_rest:  # and nothing would correct what was said under load
            self._export_forecast()

    def _kernel_counts(self, plan: StepPlan, work: Work, attention_seconds: float) -> Records:
        labels = (work.phase, ctx_of(max(chunk.end for chunk in plan.chunks)))
        kv_bytes = sum(chunk.end for chunk in plan.chunks) * self._footprint.kv_per_token
        return [
            ("attention_kernel_seconds_total", attention_seconds, labels),
            ("attention_kv_bytes_total", kv_bytes, labels),
        ]

    def _export(self) -> None:
        """The gauges. What is not known yet is left out."""
        self._next_export, self._unexported = self._clock() + _EXPORT_SECONDS, 0
        fit, model = self._model.fit(), self._model
        terms = {(term,): coefficient for term, coefficient in fit.terms.items()}
        bandwidth: dict[LabelValues, float] = {}
        if model.knows("decode"):
            per_step = fit.terms["decode_a"].value + fit.terms["decode_row"].value
            for what, size, took in (
                ("weights", self._footprint.weights, per_step),
                ("kv", self._footprint.kv_per_token, fit.terms["decode_b"].value),
            ):
                if size and took:
                    bandwidth[what,] = size / took
        crossover = fit.crossover_tokens
        self._metrics.set_gauges(
            {
                "cost_fit_seconds": {labels: term.value for labels, term in terms.items()},
                "cost_fit_lower95_seconds": {labels: term.lower for labels, term in terms.items()},
                "cost_fit_upper95_seconds": {labels: term.upper for labels, term in terms.items()},
                "cost_fit_samples": {(phase,): count for phase, count in fit.samples.items()},
                "cost_fit_max_tokens": {(phase,): tokens for phase, tokens in fit.max_tokens.items()},
                "cost_fit_crossover_tokens": {} if crossover is None else {(): crossover},
                "achieved_bandwidth_bytes_per_second": bandwidth,
            }
        )
        self._export_forecast()

    def _export_forecast(self) -> None:
        first = self._forecast.of_length(SHORT_PROMPT, 0, self._answer_tokens).first_token
        self._metrics.set_gauges({"predicted_ttft_seconds": {} if first is None else {(): first}})


def _token_of(job: Job, now: float) -> TokenOf:
    gap = None if job.last_token is None else now - job.last_token
    return TokenOf(job.ledger, gap, job.request.num_preemptions)


def _stall_counts(stalls: Stalls) -> Records:
    causes = (("prefill", stalls.prefill), ("preemption", stalls.preemption), ("other", stalls.other))
    counts: Records = [("stall_seconds_total", ns / NANOSECONDS, (cause,)) for cause, ns in causes if ns]
    caused = [("stall_caused_seconds_total", ns / NANOSECONDS, (ctx_of(length),)) for length, ns in stalls.caused]
    return counts + caused
