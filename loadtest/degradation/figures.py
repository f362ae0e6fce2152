"""Figures of a card, from its document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pagestream.loadtest.degradation.dilution import ROWS
from pagestream.loadtest.figure import COLORS, GREY, duration, new_figure, seconds_axis, token_axis

Part = dict[str, Any]


def plot_interval(
    axes: Axes, x: Sequence[float], values: Sequence[Part], label: str, color: str, style: str = "o-"
) -> None:
    """A line through the estimates inside the band of their intervals."""
    axes.plot(x, [each["value"] for each in values], style, color=color, label=label)
    lower, upper = ([each[side] for each in values] for side in ("lower", "upper"))
    axes.fill_between(x, lower, upper, color=color, alpha=0.18, linewidth=0)


def draw_first_token(axes: Axes, latency: Part) -> None:
    points, fit = latency["points"], latency["prefill"]
    tokens = np.array([point["tokens"] for point in points], float)
    plot_interval(axes, list(tokens), [point["first_token"] for point in points], "measured", COLORS[0], "o")
    a, b, c = (fit[name]["value"] for name in "abc")
    n = np.geomspace(tokens[0], tokens[-1], 100)
    axes.plot(n, a + b * n + c * n**2, color=COLORS[1], label="a + b n + c n²")
    axes.plot(n, a + b * n, "--", color=GREY, label="its line alone")
    token_axis(axes, "prompt, tokens")
    seconds_axis(axes.yaxis, "first token after")
    axes.legend()


def draw_gap(axes: Axes, latency: Part) -> None:
    points, fit = latency["points"], latency["decode"]
    tokens = np.array([point["tokens"] for point in points], float)
    plot_interval(axes, list(tokens), [point["gap"] for point in points], "measured", COLORS[0], "o")
    n = np.geomspace(tokens[0], tokens[-1], 100)
    axes.plot(n, fit["a"]["value"] + fit["b"]["value"] * n, color=COLORS[1], label="a + b n")
    token_axis(axes, "context, tokens")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: duration(round(value, 6)))
    axes.set_ylabel("time per token")
    axes.legend()


def draw_interference(axes: Axes, interference: Part) -> None:
    points = interference["points"]
    tokens = [point["tokens"] for point in points]
    lines = (("worst_gap", "longest gap"), ("p99_gap", "99th percentile"))
    for color, (name, label) in zip(COLORS, lines, strict=False):
        plot_interval(axes, tokens, [point[name] for point in points], label, color)
    for name, style, label in (
        ("worst_gap_null", ":", "longest, without it"),
        ("typical_gap", "--", "median, without it"),
    ):
        axes.plot(tokens, [point[name]["value"] for point in points], style, color=GREY, label=label)
    token_axis(axes, "prompt that arrives, tokens")
    seconds_axis(axes.yaxis, "gap between tokens")
    axes.legend()


def draw_effective_context(axes: Axes, dilution: Part) -> None:
    points = dilution["points"]
    tokens = [point["tokens"] for point in points]
    for color, group in zip(COLORS, points[0]["groups"], strict=False):
        values = [point["groups"][group]["effective_context_tokens"] for point in points]
        plot_interval(axes, tokens, values, f"{group} layers", color)
    axes.plot(tokens, [np.exp(point["uniform_entropy_nats"]) for point in points], "--", color=GREY, label="uniform")
    null = [np.exp(point["gaussian_entropy_nats"]) for point in points]
    axes.plot(tokens, null, ":", color=GREY, label="no structure (Gaussian)")
    token_axis(axes, "context, tokens")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("effective context, tokens")
    axes.legend()


def draw_masses(axes: Axes, dilution: Part) -> None:
    """Means over the layer groups, which are thirds."""
    points = dilution["points"]
    tokens = [point["tokens"] for point in points]
    names = {"sink_mass": "first 4 tokens (sink)", "middle_mass": "between", "recent_mass": "last 64 tokens"}
    shares = [
        [np.mean([group[name]["value"] for group in point["groups"].values()]) for point in points] for name in names
    ]
    axes.stackplot(tokens, shares, labels=list(names.values()), colors=(COLORS[8], COLORS[5], COLORS[0]), alpha=0.75)
    uniform = [min(1.0, 64 / point["tokens"]) for point in points]
    axes.plot(
        tokens, [1 - share for share in uniform], "--", color="black", label="where uniform would begin its last 64"
    )
    token_axis(axes, "context, tokens")
    _share_of_attention(axes)
    _legend_below(axes)


def draw_sinks(axes: Axes, dilution: Part) -> None:
    points = dilution["points"]
    tokens = [point["tokens"] for point in points]
    for color, group in zip(COLORS, points[0]["groups"], strict=False):
        plot_interval(axes, tokens, [point["groups"][group]["sink_mass"] for point in points], f"{group} layers", color)
    sink = dilution["meta"]["sink_tokens"]
    axes.plot(tokens, [sink / n for n in tokens], "--", color=GREY, label="uniform")
    token_axis(axes, "context, tokens")
    _share_of_attention(axes)
    axes.legend()


def draw_bands(axes: Axes, dilution: Part) -> None:
    """Octaves in pairs: band b is of distances from 2^b - 1."""
    points = dilution["points"]
    tokens = [point["tokens"] for point in points]
    edges = (0, 4, 6, 8, 10, 12, 16)
    masses = np.array([point["band_mass"] for point in points])
    pairs = [(low, high) for low, high in pairwise(edges) if masses[:, low:high].any()]
    labels = [f"{2**low - 1:,} to {2**high - 2:,}" if high < 16 else f"{2**low - 1:,} and more" for low, high in pairs]
    colors = plt.get_cmap("viridis_r")(np.linspace(0.05, 0.95, len(pairs)))
    axes.stackplot(
        tokens, [masses[:, low:high].sum(1) for low, high in pairs], labels=labels, colors=colors, alpha=0.85
    )
    token_axis(axes, "context, tokens")
    _share_of_attention(axes)
    _legend_below(axes)


def draw_pages(axes: Axes, dilution: Part) -> None:
    points = [point for point in dilution["points"] if point.get("pages_for_95")]
    tokens = [point["tokens"] for point in points]
    plot_interval(axes, tokens, [point["pages_for_95"] for point in points], "needed, mean over heads", COLORS[0])
    pages = [math.ceil((n + ROWS / 2) / dilution["meta"]["page_tokens"]) for n in tokens]
    axes.plot(tokens, pages, "--", color=GREY, label="all there are")
    token_axis(axes, "context, tokens")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel(f"pages of {dilution['meta']['page_tokens']} tokens")
    axes.legend()


def _share_of_attention(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("share of attention")


def _legend_below(axes: Axes) -> None:
    """Where it hides no area."""
    axes.figure.legend(loc="outside lower center", ncols=2)


def draw_task(axes: Axes, task: Part, *, exact: bool) -> None:
    tokens = [cell["tokens"] for cell in task["cells"]]
    plot_interval(axes, tokens, [cell["accuracy"] for cell in task["cells"]], "tokens right", COLORS[0])
    if exact:
        plot_interval(axes, tokens, [cell["exact"] for cell in task["cells"]], "whole answer right", COLORS[1])
    axes.axhline(task["chance"]["accuracy"], color=GREY, linestyle=":", label="chance, per token")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("right")
    token_axis(axes, "prompt and answer, tokens")
    axes.legend()


def draw_logprobs(axes: Axes, quality: Part) -> None:
    for color, (name, title) in zip(
        COLORS, (("copy", "copy"), ("key_value", "key-value"), ("passkey", "passkey")), strict=False
    ):
        cells = quality[name]["cells"]
        plot_interval(axes, [cell["tokens"] for cell in cells], [cell["logprob"] for cell in cells], title, color)
    token_axis(axes, "prompt and answer, tokens")
    axes.set_ylabel("log-probability per answer token, nats")
    axes.legend()


def draw_depths(axes: Axes, task: Part) -> None:
    cells = [cell for cell in task["cells"] if cell["exact_by_depth"]]
    depths = list(cells[0]["exact_by_depth"])
    grid = np.array([[cell["exact_by_depth"][depth]["value"] for cell in cells] for depth in depths])
    image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(grid.shape):
        axes.text(column, row, f"{grid[row, column]:.0%}", ha="center", va="center", fontsize=8.5)
    axes.set_xticks(range(len(cells)), [f"{cell['tokens']:,}" for cell in cells], rotation=45)
    names = {"0": "first", "1": "last"}
    axes.set_yticks(range(len(depths)), [names.get(depth, f"{float(depth):.0%}") for depth in depths])
    axes.set_xlabel("prompt and answer, tokens")
    axes.set_ylabel("place of the key")
    axes.grid(visible=False)
    image.set_alpha(0.8)


def draw_perplexity(axes: Axes, points: Sequence[Part]) -> None:
    tokens = [point["tokens"] for point in points]
    plot_interval(axes, tokens, [point["change"] for point in points], "change on the same tokens", COLORS[0])
    axes.axhline(0, color=GREY, linestyle=":", label="more context is no use")
    token_axis(axes, "context and target, tokens")
    axes.set_ylabel("nats per token")
    axes.legend()


def card_figures(card: Part) -> dict[str, Figure]:
    """By name, of the parts that were measured."""
    figures: dict[str, Figure] = {}

    def add(name: str, title: str, draw: Any, *arguments: Any, **named: Any) -> None:
        figures[name], axes = new_figure(title, width=5.4, height=3.6)
        draw(axes, *arguments, **named)

    if measured(card, "latency"):
        add("first_token", "Time to first token", draw_first_token, card["latency"])
        add("gap", "Time per token", draw_gap, card["latency"])
    if measured(card, "interference"):
        add("interference", "Gaps of other streams while a prompt is read", draw_interference, card["interference"])
    if measured(card, "dilution"):
        add("effective_context", "Tokens that attention is spread over", draw_effective_context, card["dilution"])
        add("masses", "Where attention goes (mean of all layers)", draw_masses, card["dilution"])
        add("sinks", "On the first tokens, by layer", draw_sinks, card["dilution"])
        if card["dilution"]["points"][0]["band_mass"]:
            add("bands", "By distance, tokens back (mean of all layers)", draw_bands, card["dilution"])
        if card["dilution"]["points"][0].get("pages_for_95"):
            add("pages", "Pages that hold 95 % of attention", draw_pages, card["dilution"])
    if measured(card, "quality"):
        quality = card["quality"]
        add("copy", "Copying random words", draw_task, quality["copy"], exact=False)
        add("key_value", "Looking a number up", draw_task, quality["key_value"], exact=True)
        add("depths", "Looking a number up, by its place: whole answer right", draw_depths, quality["key_value"])
        add("passkey", "Passkey, the sanity check", draw_task, quality["passkey"], exact=True)
        add("logprobs", "The same as log-probabilities", draw_logprobs, quality)
        add("perplexity", "Loss on the same 256 tokens after more context", draw_perplexity, quality["perplexity"])
    return figures


def overview(card: Part) -> Figure:
    """Four panels for a README; needs every part."""
    figure, ((first, gap), (context, right)) = plt.subplots(2, 2, figsize=(10.5, 7), layout="constrained")
    draw_first_token(first, card["latency"])
    first.set_title("Time to first token")
    draw_gap(gap, card["latency"])
    gap.set_title("Time per token")
    draw_effective_context(context, card["dilution"])
    context.set_title("Tokens that attention is spread over")
    names = (("copy", "accuracy", "copying random words"), ("key_value", "exact", "looking a number up"))
    for color, (name, score, label) in zip(COLORS, names, strict=False):
        cells = card["quality"][name]["cells"]
        plot_interval(right, [cell["tokens"] for cell in cells], [cell[score] for cell in cells], label, color)
    right.set_title("Right answers")
    right.set_ylim(-0.03, 1.03)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    token_axis(right, "prompt and answer, tokens")
    right.legend()
    return figure


def measured(card: Part, part: str) -> bool:
    return part in card and "not_reported" not in card[part]
