"""The result of runs as rows: each metric of each target, ours over the best peer, and the goal beside it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from peers.scenarios import SCENARIOS, Metric
from peers.targets import OURS

Values = Mapping[str, list[float]]  # target -> what was measured, a value a round


@dataclass(frozen=True)
class Row:
    """One metric. `ratio` is ours over the best peer's, of medians; None if either is missing."""

    metric: Metric
    medians: dict[str, float]
    best_peer: str | None
    ratio: float | None

    @property
    def verdict(self) -> str:
        """Which goal is met; empty without a goal or without what it is compared with."""
        goal = self.metric.goal
        value = self.medians.get(OURS) if goal and goal.absolute else self.ratio
        if goal is None or value is None:
            return ""
        if goal.aim is not None and _meets(value, goal.aim, self.metric):
            return "aim"
        return "first" if _meets(value, goal.first, self.metric) else "missed"


def _meets(value: float, goal: float, metric: Metric) -> bool:
    return value >= goal if metric.more_is_better else value <= goal


def row(metric: Metric, values: Values) -> Row:
    medians = {name: statistics.median(measured) for name, measured in values.items() if measured}
    peers = {name: median for name, median in medians.items() if name != OURS}
    if not peers:
        return Row(metric, medians, None, None)
    best = (max if metric.more_is_better else min)(peers, key=peers.__getitem__)
    return Row(metric, medians, best, medians[OURS] / peers[best] if OURS in medians else None)


def rows(scenario: str, results: Mapping[str, Mapping[str, list[float]]]) -> Iterator[tuple[Row, Values]]:
    """Of one scenario's results: target -> metric -> values."""
    for metric in SCENARIOS[scenario].metrics:
        values = {name: measured[metric.name] for name, measured in results.items() if metric.name in measured}
        if values:
            yield row(metric, values), values


def summary(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run, for its JSON file."""
    return [
        {
            "scenario": scenario,
            "metric": found.metric.name,
            "unit": found.metric.unit,
            "medians": found.medians,
            "best_peer": found.best_peer,
            "ours_over_best_peer": found.ratio,
            "verdict": found.verdict,
        }
        for scenario, results in run["values"].items()
        for found, _ in rows(scenario, results)
    ]


def print_report(run: Mapping[str, Any]) -> None:
    console = Console(width=160, soft_wrap=True)
    gigabytes = run["read_bytes_per_second"] / 1e9
    console.print(f"\n{run['cpu']}, {run['cores']} cores; reads stream at {gigabytes:.1f} GB/s; ratios of medians")
    for scenario, results in run["values"].items():
        table = Table(title=scenario, title_justify="left", box=None, pad_edge=False)
        for heading in ("", "target", "median", "min..max", "n", "ours / best peer", "goal", ""):
            table.add_column(heading, justify="right" if heading in ("median", "n", "ours / best peer") else "left")
        for found, values in rows(scenario, results):
            _add(table, found, values)
        console.print(table, "")
    for failure in run["failures"]:
        console.print(f"FAILED {failure['target']} at {failure['scenario']}: {failure['reason']}", markup=False)


def _add(table: Table, found: Row, values: Values) -> None:
    ratio = "" if found.ratio is None else f"{found.ratio:.2f}"
    heading = f"{found.metric.name}, {found.metric.unit}".strip(", ")
    for name, measured in values.items():
        best = " (best peer)" if name == found.best_peer else ""
        spread = f"{_figure(min(measured))}..{_figure(max(measured))}"
        cells = [heading, name + best, _figure(found.medians[name]), spread, str(len(measured))]
        table.add_row(*cells, *((ratio, _goal(found.metric), found.verdict) if name == OURS else ()))
        heading = ""


def _goal(metric: Metric) -> str:
    if metric.goal is None:
        return ""
    sign = ">=" if metric.more_is_better else "<="
    unit = f" {metric.unit}" if metric.goal.absolute else "x"
    steps = [f"{step:g}" for step in (metric.goal.first, metric.goal.aim) if step is not None]
    return f"{sign} {', '.join(steps)}{unit}"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
