"""Nine figures of a run, or of several together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pagestream.loadtest.figure import GREY, duration, new_figure, save, seconds_axis, styled, token_axis
from pagestream.loadtest.measures import TITLES, Objectives, Samples, collect, gaps_of
from pagestream.loadtest.plots_time import draw_goodput, draw_server, draw_throughput, draw_victim
from pagestream.loadtest.record import Record, read_records
from pagestream.loadtest.statistics import CTX, ctx_of


class PlotError(ValueError):
    """There is nothing to draw; the message says why."""


@dataclass(frozen=True)
class Runs:
    """What the figures are made of: one run, or several under the same settings."""

    records: list[list[Record]]  # by run
    gauges: list[dict[str, float]]  # of the first run, over time
    summary: dict[str, Any]  # of the first run
    objectives: Objectives

    @property
    def clean(self) -> list[Record]:
        return [record for run in self.records for record in run if record.is_clean and record.tokens]

    @property
    def clean_of_first(self) -> list[Record]:
        """Of the first run alone: moments of different runs cannot be put beside each other."""
        return [record for record in self.records[0] if record.is_clean and record.tokens]

    @property
    def samples(self) -> Samples:
        return collect(self.clean)


def load(folders: Sequence[Path]) -> Runs:
    """Raises PlotError for what is no run, or a run without an answer."""
    try:
        records = [list(read_records(folder / "requests.jsonl")) for folder in folders]
        manifest = json.loads((folders[0] / "manifest.json").read_text())
        summary = json.loads((folders[0] / "summary.json").read_text())
        server = folders[0] / "server.jsonl"
        gauges = [json.loads(line) for line in server.read_text().splitlines()] if server.exists() else []
        runs = Runs(records, gauges, summary, Objectives(**manifest["objectives"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlotError(f"{', '.join(map(str, folders))}: no run is there ({error})") from error
    if not runs.clean:
        raise PlotError(f"{', '.join(map(str, folders))}: no request was answered in full")
    return runs


def draw_all(folders: Sequence[Path], out: Path) -> list[Path]:
    """Every figure that the runs have the data for. Raises PlotError."""
    runs = load(folders)
    figures: dict[str, Callable[[], Figure | None]] = {
        "1-first-token-by-length": lambda: _first_token(runs.clean),
        "2-gap-by-context": lambda: _gaps(runs.clean),
        "3-queue-and-prefill": lambda: _shares(runs.clean),
        "4-victim": lambda: draw_victim(runs.clean_of_first),
        "5-throughput-latency": lambda: draw_throughput(runs.records),
        "6-goodput": lambda: draw_goodput(runs.records, runs.objectives),
        "7-server": lambda: draw_server(runs.gauges),
        "8-distributions": lambda: _distributions(runs.samples),
        "9-client-and-server": lambda: _agreement(runs.summary["agreement"]),
    }
    paths: list[Path] = []
    with styled():
        for name, draw in figures.items():
            if (figure := draw()) is not None:
                paths += save(figure, out, name)
    return paths


def _first_token(records: Sequence[Record]) -> Figure:
    """Log-log, with the exponent of the power law that fits best."""
    lengths = np.array([record.prompt_tokens for record in records], float)
    seconds = np.array([record.time_to_first_token for record in records])
    figure, axes = new_figure("Time to first token by length of the prompt")
    axes.plot(lengths, seconds, "o", alpha=0.45, markeredgewidth=0, label=f"{len(records)} requests")
    distinct = np.unique(lengths)
    if len(distinct) > 1:
        slope, intercept = np.polyfit(np.log(lengths), np.log(seconds), 1)
        fitted = np.exp(intercept + slope * np.log(distinct))
        axes.plot(distinct, fitted, "--", color=GREY, label=f"grows as n^{slope:.2f} between these lengths")
    token_axis(axes, "prompt, tokens")
    seconds_axis(axes.yaxis, "first token after")
    axes.legend()
    return figure


def _gaps(records: Sequence[Record]) -> Figure:
    """Mean and p99 by context. Not the median: where several tokens arrive at once, it is 0."""
    pairs = [pair for record in records for pair in gaps_of(record)]
    figure, axes = new_figure("Gap between tokens by context")
    if pairs:
        contexts, gaps = (np.array(each) for each in zip(*pairs, strict=True))
        edges = 2.0 ** np.arange(np.floor(np.log2(contexts.min()) * 2) / 2, np.log2(contexts.max()) + 0.5, 0.5)
        places = np.digitize(contexts, edges)
        present = np.unique(places)
        middles = [float(contexts[places == place].mean()) for place in present]
        means = [float(np.mean(gaps[places == place])) for place in present]
        growth = f"mean, {means[-1] / means[0]:.2f} times from {middles[0]:,.0f} to {middles[-1]:,.0f} tokens"
        axes.plot(middles, means, "o-", label=growth if means[0] > 0 and len(means) > 1 else "mean")
        axes.plot(middles, [float(np.quantile(gaps[places == place], 0.99)) for place in present], "s-", label="p99")
        token_axis(axes, "context, tokens")
        axes.yaxis.set_major_formatter(lambda value, _: duration(round(value, 6)))
        axes.set_ylim(bottom=0)
        axes.legend()
    axes.set_ylabel("gap")
    return figure


def _shares(records: Sequence[Record]) -> Figure | None:
    """Where the time to the first token goes, by the server's clock."""
    timed = [record for record in records if record.server]
    names = [ctx for ctx in CTX if any(ctx_of(record.prompt_tokens) == ctx for record in timed)]
    if not names:
        return None
    parts: dict[str, list[float]] = {"queue": [], "prefill": [], "network and client": []}
    for ctx in names:
        group = [(each, each.server) for each in timed if ctx_of(each.prompt_tokens) == ctx]
        known = [(record, server) for record, server in group if server]
        parts["queue"].append(float(np.mean([server.queue for _, server in known])))
        parts["prefill"].append(float(np.mean([server.prefill for _, server in known])))
        rest = [record.time_to_first_token - server.queue - server.prefill for record, server in known]
        parts["network and client"].append(max(0.0, float(np.mean(rest))))
    figure, axes = new_figure("Where the time to the first token goes (means)")
    bottom = np.zeros(len(names))
    for name, values in parts.items():
        axes.bar([f"≤ {ctx}" for ctx in names], values, bottom=bottom, label=name, width=0.6)
        bottom += values
    for place, height in enumerate(bottom):
        axes.annotate(
            f"{parts['queue'][place] / height:.0%} queue", (place, height), ha="center", va="bottom", fontsize=8
        )
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("seconds")
    axes.margins(y=0.12)
    axes.legend()
    return figure


def _distributions(samples: Samples) -> Figure:
    """Cumulative, of the three latencies that users feel."""
    from matplotlib import pyplot as plt  # noqa: PLC0415

    measures = ("ttft", "tpot", "itl")
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
    for axes, measure in zip(panels, measures, strict=True):
        for ctx, values in samples[measure].items():
            ordered = np.sort([value for value in values if value > 0])
            if len(ordered):
                axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=f"≤ {ctx}")
        axes.set_title(TITLES[measure])
        seconds_axis(axes.xaxis)
        axes.tick_params("x", rotation=45)
        axes.legend(title="tokens", title_fontsize=8.5)
    panels[0].set_ylabel("share of samples at most")
    return figure


def _agreement(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """Quantiles of both, read from the same buckets: on the diagonal they are equal."""
    known = [row for row in rows if row["client"] and row["server"]]
    if not known:
        return None
    figure, axes = new_figure("Quantiles: the server's histograms and the client's stamps", width=5.4, height=5.0)
    for measure in dict.fromkeys(row["measure"] for row in known):
        mine = [row for row in known if row["measure"] == measure]
        exact = sum(row["client_count"] == row["server_count"] for row in mine)
        label = f"{TITLES[measure]} ({exact} of {len(mine)} counts equal)"
        axes.plot([row["client"] for row in mine], [row["server"] for row in mine], "o", alpha=0.7, label=label)
    both = [row[side] for row in known for side in ("client", "server")]
    line = np.array([min(both) * 0.7, max(both) * 1.4])
    axes.plot(line, line, color=GREY, linewidth=1)
    axes.fill_between(line, line * 0.85, line * 1.15, color=GREY, alpha=0.25, linewidth=0, label="within 15 %")
    seconds_axis(axes.yaxis, "server")
    seconds_axis(axes.xaxis, "client")
    axes.tick_params("x", rotation=45)
    axes.legend(loc="upper left")
    return figure
