"""What the engine does with its steps, its blocks and its streams; one replica or several beside each other."""

from __future__ import annotations

from panels import Panel, Row, dashboard

M = '{model=~"$model", instance=~"$instance"}'
I = '{instance=~"$instance"}'  # noqa: E741 - beside M
RATE = "[$__rate_interval]"


def _quantiles(metric: str, by: str = "", where: str = M) -> dict[str, str]:
    labels = f"{by}, le" if by else "le"
    suffix = f", {{{{{by}}}}}" if by else ""
    return {
        f"p{round(100 * q)}{suffix}": f"histogram_quantile({q}, sum by ({labels}) "
        f"(rate(pagestream_{metric}_bucket{where}{RATE}))) >= 0"
        for q in (0.5, 0.99)
    }


def _share(part: str, whole: str) -> str:
    """0 where there was nothing to have a share of."""
    return f"(sum(rate({part}{RATE})) / sum(rate({whole}{RATE})) >= 0) or vector(0)"


DASHBOARD = dashboard(
    "pagestream-engine",
    "pagestream: engine",
    [
        Row(
            "What do steps cost?",
            [
                Panel(
                    "Step time",
                    "Wall time of engine steps: decode only, prompts only, or both in one step.",
                    _quantiles("step_seconds", "mix"),
                    log_scale=True,
                ),
                Panel(
                    "Time outside the network",
                    "Step time less the time in the network: planning, sampling, text, publishing, waiting for the "
                    "interpreter.",
                    _quantiles("host_overhead_seconds"),
                    log_scale=True,
                ),
                Panel(
                    "Attention's share of the time",
                    "Seconds in the attention kernel per second, by phase of the step. With several threads still "
                    "wall time.",
                    {"{{phase}}": f"sum by (phase) (rate(pagestream_attention_kernel_seconds_total{M}{RATE}))"},
                    unit="percentunit",
                ),
                Panel(
                    "Tokens decoded per second",
                    "In steps of their own, or beside prompts. Speculated tokens that were accepted are in it.",
                    {"{{mix}}": f"sum by (mix) (rate(pagestream_decode_step_tokens_total{M}{RATE}))"},
                    unit="none",
                    stacked=True,
                ),
                Panel(
                    "Context in the batch, tokens",
                    "Sum and longest of the contexts decoded in the last step: the keys and values that one step "
                    "must read.",
                    {
                        "sum, {{instance}}": f"pagestream_batch_context_tokens{M}",
                        "longest, {{instance}}": f"pagestream_batch_context_tokens_max{M}",
                    },
                    unit="none",
                ),
                Panel(
                    "Bandwidth achieved",
                    "Bytes of weights and of keys and values per second of step time. A model of what must be read, "
                    "over measured time: caches can make it more than memory gives.",
                    {"{{what}}, {{instance}}": f"pagestream_achieved_bandwidth_bytes_per_second{M}"},
                    unit="Bps",
                ),
            ],
        ),
        Row(
            "Where do keys and values live?",
            [
                Panel(
                    "KV blocks",
                    "Active ones belong to running requests, cached ones are given up on demand; the three add up to"
                    " the pool.",
                    {"{{state}}": f"sum by (state) (pagestream_kv_blocks{M})"},
                    unit="none",
                    stacked=True,
                ),
                Panel(
                    "Leaked blocks",
                    "Blocks that nobody owns. Must be 0.",
                    {"{{instance}}": f"pagestream_kv_leaked_blocks{M}"},
                    unit="none",
                    limit=1,
                ),
                Panel(
                    "Found in the prefix cache",
                    "Share of looked-up prompt tokens, in the window. Each tenant has a cache of its own.",
                    {
                        "hits": _share(
                            f"pagestream_prefix_cache_hit_tokens_total{M}",
                            f"pagestream_prefix_cache_queried_tokens_total{M}",
                        )
                    },
                    unit="percentunit",
                ),
                Panel(
                    "Preemptions per second",
                    "Running requests sent back to the queue for want of blocks, per second. A few are cheap: the "
                    "cache keeps what they had.",
                    {"{{reason}}": f"sum by (reason) (rate(pagestream_preemptions_total{M}{RATE}))"},
                    unit="none",
                ),
                Panel(
                    "Computed again",
                    "Tokens recomputed after a preemption or a pause, over all prompt tokens computed.",
                    {
                        "share": _share(
                            f"pagestream_recomputed_tokens_total{M}",
                            'pagestream_prompt_tokens_total{model=~"$model", instance=~"$instance", source="computed"}',
                        )
                    },
                    unit="percentunit",
                    limit=0.2,
                ),
                Panel(
                    "Cached blocks given up per second",
                    "Per second. Many beside few hits: the pool is too small for the prompts that come back.",
                    {"{{instance}}": f"rate(pagestream_prefix_cache_evicted_blocks_total{M}{RATE})"},
                    unit="none",
                ),
            ],
        ),
        Row(
            "What about the streams?",
            [
                Panel(
                    "Calls in progress",
                    "gRPC calls begun and not ended, by method, health watches too.",
                    {"{{method}}": f"sum by (method) (pagestream_grpc_active_streams{I})"},
                    unit="none",
                ),
                Panel(
                    "Calls by status",
                    "Ended calls per second, by gRPC status code.",
                    {"{{code}}": f"sum by (code) (rate(pagestream_grpc_server_handled_total{I}{RATE}))"},
                    unit="reqps",
                ),
                Panel(
                    "Slow readers",
                    "Streams out of the batch because their clients do not read, and the seconds per second lost so;"
                    " a pause counts when it ends.",
                    {
                        "paused now": f"sum(pagestream_streams_paused{M})",
                        "seconds/s": f"sum(rate(pagestream_stream_backpressure_seconds_total{M}{RATE}))",
                    },
                    unit="none",
                ),
                Panel(
                    "Cancel to blocks free",
                    "How long a cancelled request kept its blocks. Nothing is shown where nobody cancelled.",
                    _quantiles("cancel_release_seconds", "by"),
                    log_scale=True,
                ),
                Panel(
                    "Speculated tokens per second",
                    "Tokens proposed from the prompt per second, by what became of them. Rejected ones cost a little"
                    " of a step.",
                    {"{{result}}": f"sum by (result) (rate(pagestream_speculated_tokens_total{M}{RATE}))"},
                    unit="none",
                ),
                Panel(
                    "Ended by",
                    "Admitted requests per second, by why they ended.",
                    {"{{reason}}": f"sum by (reason) (rate(pagestream_requests_finished_total{M}{RATE}))"},
                    unit="reqps",
                    stacked=True,
                ),
            ],
        ),
        Row(
            "And the process?",
            [
                Panel(
                    "Event loop lag",
                    "How late the loop runs a timer; every stream waits so long on top of the engine.",
                    _quantiles("event_loop_lag_seconds", where=I),
                    log_scale=True,
                ),
                Panel(
                    "Tokenising",
                    "Time to turn one prompt into tokens, off the event loop; grows with the prompt.",
                    _quantiles("tokenize_seconds", where=I),
                    log_scale=True,
                ),
                Panel(
                    "CPU, cores",
                    "Seconds of processor time per second, all threads of the process.",
                    {"{{instance}}": 'rate(process_cpu_seconds_total{job="pagestream"}[$__rate_interval])'},
                    unit="none",
                ),
                Panel(
                    "Versions",
                    "What runs where. During a rollout there are two.",
                    {"{{instance}}: {{version}}": f"pagestream_build_info{I}"},
                    unit="none",
                    kind="stat",
                    width=12,
                ),
                Panel(
                    "Load time",
                    "Start of loading to ready. A self-test and the warm-up are in it.",
                    {"{{instance}}": f"pagestream_model_load_seconds{I}"},
                    kind="stat",
                    width=12,
                ),
            ],
        ),
    ],
)
