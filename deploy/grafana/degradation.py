"""Why are long prompts slow, what do they cost others, and does it cost what it should?"""

from __future__ import annotations

from panels import Panel, Row, dashboard

M = '{model=~"$model"}'
RATE = "[$__rate_interval]"
TTFT = "model_ctx:pagestream_time_to_first_token_seconds"
GAP = "model_ctx:pagestream_inter_token_latency_seconds"


def _goodput(objective: str) -> str:
    return f'model_ctx_objective:pagestream_slo_requests:met_share_5m{{model=~"$model", objective="{objective}"}}'


def _share(metric: str) -> dict[str, str]:
    total = f"sum(rate(pagestream_{metric}{M}{RATE}))"
    shares = f"sum by (ctx) (rate(pagestream_{metric}{M}{RATE})) / ignoring (ctx) group_left () {total}"
    return {"≤ {{ctx}}": f"{shares} >= 0"}


def _fit(term: str) -> dict[str, str]:
    label = f'{{model=~"$model", term="{term}"}}'
    return {
        "fit": f"pagestream_cost_fit_seconds{label}",
        "lower 95 %": f"pagestream_cost_fit_lower95_seconds{label}",
        "upper 95 %": f"pagestream_cost_fit_upper95_seconds{label}",
    }


DASHBOARD = dashboard(
    "pagestream-degradation",
    "pagestream: long prompts",
    [
        Row(
            "Is it slow because prompts are long?",
            [
                Panel(
                    "Time to first token by prompt length, p95",
                    "ctx is the prompt's length rounded up. Time in the queue is in it: see the two panels below. A "
                    "length without requests in five minutes has no line.",
                    {"≤ {{ctx}}": f"{TTFT}:p95_5m{M}"},
                    log_scale=True,
                ),
                Panel(
                    "Time to first token by prompt length, now",
                    "Medians of the last five minutes. Edges of buckets double, so a median is known to within a "
                    "factor of 2 at worst.",
                    {"≤ {{ctx}}": f"sort_desc({TTFT}:p50_5m{M})"},
                    kind="bargauge",
                ),
                Panel(
                    "Time to first token, all lengths",
                    "Two bands mean two kinds of prompts or two kinds of days; the panels beside tell which.",
                    {"{{le}}": f"sum by (le) (increase(pagestream_time_to_first_token_seconds_bucket{M}{RATE}))"},
                    kind="heatmap",
                ),
                Panel(
                    "In the queue",
                    "Mean time from receipt to the first turn, by prompt length. Time lost to a preemption is not in"
                    " it.",
                    {"≤ {{ctx}}": f"model_ctx:pagestream_queue_time_seconds:mean_5m{M}"},
                ),
                Panel(
                    "Reading the prompt",
                    "Mean time from the first turn to the first token, by prompt length. Other requests share the "
                    "steps, so it is more than the work of the prompt alone.",
                    {"≤ {{ctx}}": f"model_ctx:pagestream_prefill_time_seconds:mean_5m{M}"},
                    log_scale=True,
                ),
                Panel(
                    "Prefill seconds per 1,000 computed tokens",
                    "A mean over all lengths: it rises with the share of long prompts even if nothing has changed.",
                    {"{{model}}": f"model:pagestream_prefill_time_seconds:per_thousand_tokens_5m{M}"},
                ),
            ],
        ),
        Row(
            "How much slower is a token in a long context?",
            [
                Panel(
                    "Degradation factor",
                    "Mean gap at a context over that at the shortest context with samples, in ten minutes. Batches"
                    " differ, so it holds the work of others too; the cost model below does not.",
                    {"≤ {{ctx}}": f"{GAP}:degradation_factor_10m{M}"},
                    unit="none",
                ),
                Panel(
                    "Gap between tokens by context, p50",
                    "ctx is the context at the later of the two tokens. Tokens of one step count as gaps of 0 after "
                    "the first.",
                    {"≤ {{ctx}}": f"{GAP}:p50_5m{M}"},
                    log_scale=True,
                ),
                Panel(
                    "Gap between tokens by context, p99",
                    "The worst gaps are mostly other requests' prompts: see who blocks whom.",
                    {"≤ {{ctx}}": f"{GAP}:p99_5m{M}"},
                    log_scale=True,
                ),
            ],
        ),
        Row(
            "Does it cost what the cost model says?",
            [
                Panel(
                    "Prefill: seconds per token",
                    "b of a + b n + c n², fitted to steps as they ran, with its 95 % interval. Holds up to the "
                    "longest context seen, not beyond.",
                    _fit("prefill_b"),
                    width=6,
                ),
                Panel(
                    "Prefill: seconds per token²",
                    "c of a + b n + c n². If the interval includes 0, nothing quadratic has been shown. Fitted on "
                    "contexts far below the crossover it says little.",
                    _fit("prefill_c"),
                    width=6,
                ),
                Panel(
                    "Decode: seconds per context token",
                    "b of a + b n per sequence: what a token more in the context adds to each token generated.",
                    _fit("decode_b"),
                    width=6,
                ),
                Panel(
                    "Range of the fit",
                    "Longest context that the fit has seen, and where its quadratic term would pass the linear one: 0 "
                    "while no quadratic term has been shown. A crossover beyond the range is an extrapolation.",
                    {
                        "longest seen, {{phase}}": f"pagestream_cost_fit_max_tokens{M}",
                        "crossover": f"max(pagestream_cost_fit_crossover_tokens{M}) or vector(0)",
                        "samples, {{phase}}": f"pagestream_cost_fit_samples{M}",
                    },
                    unit="none",
                    kind="stat",
                    width=6,
                ),
                Panel(
                    "Actual over predicted, p90",
                    "Of steps, by phase. Immune to the mix of prompts: above 1.5 the machine is slower than it was, "
                    "whatever is asked of it.",
                    {"{{phase}}": f"model_phase:pagestream_cost_residual_ratio:p90_10m{M}"},
                    unit="none",
                    limit=1.5,
                ),
                Panel(
                    "First token, actual over predicted",
                    "Of requests. What arrived after the forecast was made is in the actual time and not in the "
                    "forecast.",
                    {
                        f"p{round(100 * q)}": f"histogram_quantile({q}, sum by (le) "
                        f"(rate(pagestream_ttft_residual_ratio_bucket{M}{RATE})))"
                        for q in (0.5, 0.9)
                    },
                    unit="none",
                ),
                Panel(
                    "Attention bandwidth",
                    "Bytes of keys and values that the kernel had to read, over the time of the steps' attention, by"
                    " the longest context of a step. Less than memory can do means the kernel is limited by "
                    "something else.",
                    {"{{phase}}, ≤ {{ctx}}": f"model_phase_ctx:pagestream_attention_kv_bytes:per_kernel_second_5m{M}"},
                    unit="Bps",
                ),
            ],
        ),
        Row(
            "Who waits, and who blocks whom?",
            [
                Panel(
                    "Waiting, by context",
                    "Requests in the queue at each scrape.",
                    {"≤ {{ctx}}": f"sum by (ctx) (pagestream_waiting_requests{M})"},
                    unit="none",
                    stacked=True,
                ),
                Panel(
                    "Running, by context",
                    "Requests in the batch at each scrape.",
                    {"≤ {{ctx}}": f"sum by (ctx) (pagestream_running_requests{M})"},
                    unit="none",
                    stacked=True,
                ),
                Panel(
                    "Interference of prompts with answers",
                    "Seconds per generated token in steps that also read prompts, over steps that do not; 1 is none."
                    " Batches of the two kinds may differ in size.",
                    {"{{model}}": f"model:pagestream_decode_step_seconds:interference_5m{M}"},
                    unit="none",
                ),
                Panel(
                    "Stall suffered",
                    "Seconds per second that answers waited beyond the forecast of their own work, by cause, summed "
                    "over streams. It depends on the cost model being right.",
                    {"{{cause}}": f"model_cause:pagestream_stall_seconds:rate_5m{M}"},
                    limit=0.05,
                    stacked=True,
                ),
                Panel(
                    "Stall caused, by the prompt's length",
                    "The same seconds, charged to the prompts that were read in those steps, by their tokens in the "
                    "step.",
                    {"≤ {{ctx}}": f"model_ctx:pagestream_stall_caused_seconds:rate_5m{M}"},
                    stacked=True,
                ),
                Panel(
                    "Prompt tokens per step",
                    "How much of a prompt one step reads; the pace keeper makes chunks small while answers run.",
                    {
                        f"p{round(100 * q)}": f"histogram_quantile({q}, sum by (le) "
                        f"(rate(pagestream_prefill_chunk_tokens_bucket{M}{RATE})))"
                        for q in (0.5, 0.95)
                    },
                    unit="none",
                ),
            ],
        ),
        Row(
            "Would parting short from long prompts pay?",
            [
                Panel(
                    "Share of requests, by prompt length",
                    "Read the three together: a length that is few of the requests and most of the time or the stall"
                    " is one that a pool of its own would take away from the others.",
                    _share("prefill_time_seconds_count"),
                    unit="percentunit",
                    stacked=True,
                ),
                Panel(
                    "Share of reading time, by prompt length",
                    "Time from the first turn to the first token, with what else ran beside it; so long prompts that"
                    " wait for each other count more than their work.",
                    _share("prefill_time_seconds_sum"),
                    unit="percentunit",
                    stacked=True,
                ),
                Panel(
                    "Share of stall caused, by prompt length",
                    "Of the seconds that answers waited for others' prompts. Prompts parted from answers of their "
                    "own length still stall each other: parting moves the stall of short ones, it does not remove "
                    "that of long ones.",
                    _share("stall_caused_seconds_total"),
                    unit="percentunit",
                    stacked=True,
                ),
            ],
        ),
        Row(
            "Which lengths meet their objectives?",
            [
                Panel(
                    f"Goodput: {name}",
                    "Share of requests within the configured objective, by length. One objective for all lengths is "
                    "harsh to long prompts: reading grows with them.",
                    {"≤ {{ctx}}": _goodput(objective)},
                    unit="percentunit",
                )
                for objective, name in (("ttft", "first token"), ("itl", "gap between tokens"), ("e2e", "whole answer"))
            ],
        ),
    ],
)
