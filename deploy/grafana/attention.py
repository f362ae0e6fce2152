"""Where does attention go as context grows, and does the model still work at that length?"""

from __future__ import annotations

from panels import Panel, Row, dashboard, text

M = '{model=~"$model"}'
RATE = "[$__rate_interval]"

CAVEATS = """\
Attention weights show where value vectors were mixed in one head. They are **not an explanation of the output**:
residual paths, MLPs and value norms matter, and different weights can give the same output (Jain & Wallace
1902.10186; qualified by Wiegreffe & Pinter 1908.04626). Numbers are means over the heads of a layer group; a few
heads can behave differently, and those few do the retrieval. The first token acts as a sink; *rest* excludes it.
Prompt rows served from the prefix cache are not observed. Entropy tracks length and model, **not whether an answer is
right**, and no alert looks at it. The causal check is `AblateSpans`.
"""
PER_ROW = "Mean over the rows observed in the window, by context and layer group."


def _mean(name: str, by: str = "ctx, layers", rows: str = "attention_rows_total") -> str:
    return f"sum by ({by}) (rate(pagestream_{name}_total{M}{RATE})) / sum by ({by}) (rate(pagestream_{rows}{M}{RATE}))"


def _quantiles(metric: str) -> dict[str, str]:
    return {
        f"p{round(100 * q)}": f"histogram_quantile({q}, sum by (le) (rate(pagestream_{metric}_bucket{M}{RATE})))"
        for q in (0.5, 0.9)
    }


SINK = "model_ctx_layers:pagestream_attention_sink_mass:mean_5m"
RECENT = "model_ctx_layers:pagestream_attention_recent_mass:mean_5m"

DASHBOARD = dashboard(
    "pagestream-attention",
    "pagestream: attention",
    [
        Row("Before you read on", [text("What these numbers are not", CAVEATS)]),
        Row(
            "Where does attention go as context grows?",
            [
                Panel(
                    "Effective context, tokens",
                    f"exp of the mean entropy, in tokens: geometric over heads. {PER_ROW} Compare it with the "
                    "context: equal would be uniform attention. Large or small is neither good nor bad.",
                    {
                        "{{layers}}, ≤ {{ctx}}": "model_ctx_layers:pagestream_attention_effective_context_tokens:"
                        f"geometric_mean_5m{M}"
                    },
                    unit="none",
                    log_scale=True,
                ),
                Panel(
                    "Effective context without the first token, tokens",
                    "As beside, with the sink taken out exactly (chain rule of entropy), over rows where more than a"
                    " thousandth of the mass is left.",
                    {
                        "{{layers}}, ≤ {{ctx}}": "exp("
                        + _mean("attention_entropy_rest_nats", rows="attention_rest_rows_total")
                        + ")"
                    },
                    unit="none",
                    log_scale=True,
                ),
                Panel(
                    "Dilution exponent",
                    "Slope of mean entropy on log context over rows: 0 is a focus independent of length, 1 is "
                    "uniform. A fingerprint of model and texts, not a quality; few samples or one length only give "
                    "no slope.",
                    {
                        "{{layers}}": f"pagestream_attention_dilution_exponent{M}",
                        "samples, {{layers}}": f"pagestream_attention_dilution_samples{M}",
                    },
                    unit="none",
                    kind="stat",
                ),
                Panel(
                    "Sink mass",
                    f"Mass on the first tokens. {PER_ROW} Idle capacity, not a sign that the prompt is ignored; a "
                    "sudden loss of it means damaged keys.",
                    {"{{layers}}, ≤ {{ctx}}": f"{SINK}{M}"},
                    unit="percentunit",
                ),
                Panel(
                    "Recent mass",
                    f"Mass on the last tokens. {PER_ROW} Their uniform share shrinks as the context grows, so a "
                    "falling mass can still be a growing preference.",
                    {"{{layers}}, ≤ {{ctx}}": f"{RECENT}{M}"},
                    unit="percentunit",
                ),
                Panel(
                    "Middle mass",
                    f"What is neither sink nor recent. {PER_ROW} Little mass does not mean that text can be deleted: "
                    "later keys already contain it.",
                    {"{{layers}}, ≤ {{ctx}}": f"1 - {SINK}{M} - {RECENT}{M}"},
                    unit="percentunit",
                ),
                Panel(
                    "Mass by distance, now",
                    "Band b holds distances from 2^b - 1 to 2^(b+1) - 2 tokens, so far bands hold more tokens, and "
                    "contexts of all lengths are in it.",
                    {
                        "band {{band}}": f"sum by (band) (rate(pagestream_attention_band_mass_total{M}{RATE}))"
                        f" / ignoring (band) group_left () sum(rate(pagestream_attention_band_mass_total{M}{RATE}))"
                    },
                    unit="percentunit",
                    kind="bargauge",
                ),
                Panel(
                    "Largest weight",
                    f"Mean of each head's largest weight; often the sink's. {PER_ROW}",
                    {"{{layers}}, ≤ {{ctx}}": _mean("attention_p_max")},
                    unit="percentunit",
                ),
                Panel(
                    "Rows observed per second",
                    "How much all of this rests on, per second.",
                    {"≤ {{ctx}}": f"sum by (ctx) (rate(pagestream_attention_rows_total{M}{RATE}))"},
                    unit="none",
                ),
            ],
        ),
        Row(
            "Would sparse attention or offload pay?",
            [
                Panel(
                    "Pages that hold 95 % of the mass",
                    "Sampled steps only. A hint for eviction and offload, to be checked by perplexity; heads need "
                    "different pages.",
                    {"≤ {{ctx}}": _mean("attention_pages95", "ctx", "attention_sampled_rows_total")},
                    unit="none",
                    width=12,
                ),
                Panel(
                    "Heads disagree by, above chance, nats",
                    "Jensen-Shannon divergence between heads less that of shifted copies, in nats, sampled steps. "
                    "Independent heads are at 0. Neither direction is good: redundancy and specialisation both have "
                    "uses.",
                    {
                        "≤ {{ctx}}": f"({_mean('attention_head_jsd_nats', 'ctx', 'attention_sampled_rows_total')}) - "
                        f"({_mean('attention_head_jsd_null_nats', 'ctx', 'attention_sampled_rows_total')})"
                    },
                    unit="none",
                    width=12,
                ),
            ],
        ),
        Row(
            "Does it still work at that length?",
            [
                Panel(
                    "Canaries: log-probability of the right answer, nats",
                    "Small copy and look-up probes at fixed lengths, run beside the traffic, against their baseline."
                    " They show damage, not how well your own task goes.",
                    {
                        "{{task}}, {{ctx}}": f"pagestream_canary_logprob{M}",
                        "baseline of {{task}}, {{ctx}}": f"pagestream_canary_baseline_logprob{M}",
                    },
                    unit="none",
                    width=16,
                ),
                Panel(
                    "Canary runs per hour",
                    "A canary gives way to clients, so a server that is always busy skips them, and the panel beside"
                    " stands still. Failed ones were refused or broke, whatever their answer.",
                    {"{{result}}": f"sum by (result) (increase(pagestream_canary_runs_total{M}[1h]))"},
                    unit="none",
                ),
                Panel(
                    "Output entropy, nats",
                    "Of the raw logits at temperature 1, per generated token. A weak sign of uncertainty, no "
                    "calibrated probability of being right.",
                    _quantiles("output_entropy_nats"),
                    unit="none",
                    width=12,
                ),
                Panel(
                    "Surprisal of the sampled token, nats",
                    "Under the raw logits, before penalties and top-p. Depends on the sampling settings of the "
                    "traffic.",
                    _quantiles("output_surprisal_nats"),
                    unit="none",
                    width=12,
                ),
            ],
        ),
        Row(
            "Is it healthy?",
            [
                Panel(
                    "Integrity events per hour",
                    "nan and sink_lost mean damaged keys or kernels and page somebody; the entropy kinds are a hint "
                    "to look.",
                    {"{{kind}}": f"sum by (kind) (increase(pagestream_integrity_events_total{M}[1h]))"},
                    unit="none",
                ),
                Panel(
                    "Self-test",
                    "Kernel against mathematics at the start of the process, on its device: 1 passed. Not run again "
                    "later.",
                    {"{{instance}}, {{test}}": 'pagestream_selftest_ok{instance=~"$instance"}'},
                    unit="none",
                    kind="stat",
                ),
                Panel(
                    "Largest error of the self-test",
                    "As a share of what that test allows; above 1 the server does not become ready.",
                    {"{{instance}}, {{test}}": 'pagestream_selftest_max_error{instance=~"$instance"}'},
                    unit="percentunit",
                    kind="stat",
                ),
            ],
        ),
    ],
)
