"""Is it up, how much does it serve, does it keep its promises?"""

from __future__ import annotations

from panels import Panel, Row, dashboard

M = '{model=~"$model"}'
RATE = "[$__rate_interval]"


def _quantile(quantile: float, metric: str) -> str:
    return f"histogram_quantile({quantile}, sum by (le) (rate(pagestream_{metric}_bucket{M}{RATE})))"


DASHBOARD = dashboard(
    "pagestream-overview",
    "pagestream: overview",
    [
        Row(
            "Is it up?",
            [
                Panel(
                    "Ready replicas",
                    "Replicas that take requests now, of those that answer the scraper.",
                    {"ready": "sum(pagestream_ready)", "of": 'count(up{job="pagestream"})'},
                    unit="none",
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Alerts firing",
                    "Of our own alerts, pending ones not counted. 0 also where Prometheus has not loaded alerts.yml.",
                    {"alerts": 'count(ALERTS{alertname=~"Pagestream.*", alertstate="firing"}) or vector(0)'},
                    unit="none",
                    kind="stat",
                    width=4,
                    limit=1,
                ),
                Panel(
                    "Running",
                    "Requests in the batch at the last scrape; what comes and goes between scrapes is not seen.",
                    {"running": f"sum(pagestream_running_requests{M})"},
                    unit="none",
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Waiting",
                    "Requests in the queue at the last scrape, of all lengths.",
                    {"waiting": f"sum(pagestream_waiting_requests{M})"},
                    unit="none",
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Output tokens/s",
                    "Tokens generated, also those of requests that were cancelled later.",
                    {"output": f"sum(rate(pagestream_output_tokens_total{M}{RATE}))"},
                    unit="none",
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "First token for a newcomer",
                    "Forecast for a short prompt that arrived now, from the backlog and the fitted cost model. It does "
                    "not know what will arrive next.",
                    {"forecast": f"max(pagestream_predicted_ttft_seconds{M})"},
                    kind="stat",
                    width=4,
                ),
            ],
        ),
        Row(
            "What does it serve?",
            [
                Panel(
                    "Requests/s by outcome",
                    "Ended requests. Rejected ones were refused before they cost anything.",
                    {"{{outcome}}": f"sum by (outcome) (rate(pagestream_request_duration_seconds_count{M}{RATE}))"},
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    "Refusals/s by reason",
                    "queue_full and draining are the server's doing; the others mostly the client's.",
                    {"{{reason}}": f"sum by (reason) (rate(pagestream_requests_rejected_total{M}{RATE}))"},
                    unit="reqps",
                ),
                Panel(
                    "Tokens/s",
                    "Prompt tokens that were computed, prompt tokens found in the prefix cache, and generated tokens. "
                    "A generated token costs more than a computed prompt token.",
                    {
                        "prompt, {{source}}": f"sum by (source) (rate(pagestream_prompt_tokens_total{M}{RATE}))",
                        "output": f"sum(rate(pagestream_output_tokens_total{M}{RATE}))",
                    },
                    unit="none",
                ),
            ],
        ),
        Row(
            "Is it fast?",
            [
                Panel(
                    "Time to first token, all lengths",
                    "Mixes short and long prompts: a shift of the mix moves it although nothing became slower. The "
                    "degradation dashboard tells lengths apart. Quantiles are read between bucket edges that double.",
                    {f"p{round(100 * q)}": _quantile(q, "time_to_first_token_seconds") for q in (0.5, 0.95, 0.99)},
                    log_scale=True,
                ),
                Panel(
                    "Gap between tokens, all contexts",
                    "Engine side; the network is not in it. Several tokens of one step count as gaps of 0 after the "
                    "first.",
                    {f"p{round(100 * q)}": _quantile(q, "inter_token_latency_seconds") for q in (0.5, 0.95, 0.99)},
                    log_scale=True,
                ),
                Panel(
                    "Objectives missed",
                    "Share of requests in five minutes that missed an objective. At 14 % for an hour a monthly "
                    "budget of 1 % is gone in two days.",
                    {"{{objective}}": f"model_objective:pagestream_slo_requests:missed_share_5m{M}"},
                    unit="percentunit",
                    limit=0.144,
                ),
            ],
        ),
        Row(
            "Is there room?",
            [
                Panel(
                    "KV pool in use",
                    "Blocks that running requests hold, over all. Cached blocks are not in it: they are given up on "
                    "demand.",
                    {"{{instance}}": f"pagestream_kv_cache_usage_ratio{M}"},
                    unit="percentunit",
                    limit=0.95,
                ),
                Panel(
                    "Queue",
                    "Age of the oldest request in the queue. It grows also while the engine hangs.",
                    {"oldest, {{instance}}": f"pagestream_oldest_waiting_seconds{M}"},
                    limit=30,
                ),
                Panel(
                    "Memory",
                    "Resident memory of the process, on the host's side. A GPU's memory is not in it.",
                    {"{{instance}}": 'process_resident_memory_bytes{job="pagestream"}'},
                    unit="bytes",
                ),
            ],
        ),
    ],
)
