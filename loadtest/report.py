"""Runs told on a terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

from pagestream.loadtest.measures import MEASURES, TITLES
from pagestream.loadtest.run import Progress
from pagestream.loadtest.statistics import QUANTILES


def live_view(progress: Progress) -> Text:
    """One line while a run lasts."""
    records = progress.records
    seconds = max(time.monotonic() - progress.begin, 0.001) if progress.begin else 0.0
    tokens = sum(record.output_tokens for record in records)
    failed = sum(record.outcome == "failed" for record in records)
    firsts = sorted(record.time_to_first_token for record in records if record.tokens)
    parts = [
        f"{seconds:5.0f} s",
        f"{progress.sent} sent",
        f"{progress.sent - len(records)} under way",
        f"{len(records)} ended",
        *([f"{failed} failed"] if failed else []),
        f"{tokens / seconds if seconds else 0:.0f} tokens/s",
    ]
    if firsts:
        parts.append(f"first token p50 {milliseconds(firsts[len(firsts) // 2])}")
    return Text(" · ".join(parts))


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    ends = ", ".join(f"{count} {name}" for name, count in summary["outcomes"].items() if count)
    console.print(
        f"{summary['requests']} requests in {summary['seconds']:.1f} s: {ends or 'none'}; "
        f"{summary['requests_per_second']:.2f} answers/s, {summary['output_tokens_per_second']:.0f} tokens/s"
    )
    if lag := summary["send_lag"]:
        console.print(f"sent late by {milliseconds(lag['p50'])} (p50), {milliseconds(lag['max'])} (at most)")
    console.print(Group(_latency(summary["latency"]), _goodput(summary["goodput"])))
    for error in summary["errors"]:
        console.print(f"{error['count']} x {error['code']} {error['reason']}: {error['message']}", style="red")
    if summary["agreement"]:
        if summary["faults"]:
            console.print("requests with faults are in the server's counts alone", style="dim")
        console.print(_agreement(summary["agreement"]))


def _latency(latency: dict[str, Any]) -> Table:
    table = Table("seconds, by length", "ctx ≤", *map(_right, ("count", *QUANTILES, "max")), box=None)
    for measure in MEASURES:
        for ctx, values in latency[measure].items():
            numbers = (_short(values[name]) for name in (*QUANTILES, "max"))
            table.add_row(TITLES[measure], ctx, str(values["count"]), *numbers)
    return table


def _goodput(goodput: dict[str, Any]) -> Table:
    table = Table("within the objectives", "ctx ≤", *map(_right, ("requests", "share", "per second")), box=None)
    for ctx, values in goodput.items():
        table.add_row("", ctx, str(values["requests"]), f"{values['share']:.1%}", f"{values['per_second']:.2f}")
    return table


def _agreement(rows: list[dict[str, Any]]) -> Table:
    """One line for each measure and length: counts, and the quantiles of both in the server's buckets."""
    names = list(dict.fromkeys(row["quantile"] for row in rows))
    heads = map(_right, ("counts", *names))
    table = Table("client/server", "ctx ≤", *heads, "≤ 15 %", box=None, padding=(0, 1, 0, 0))  # 80 columns
    for measure, ctx in dict.fromkeys((row["measure"], row["ctx"]) for row in rows):
        mine = [row for row in rows if (row["measure"], row["ctx"]) == (measure, ctx)]
        counts = f"{mine[0]['client_count']}/{mine[0]['server_count']}"
        pairs = (f"{_short(row['client'])}/{_short(row['server'])}" for row in mine)
        table.add_row(measure, ctx, counts, *pairs, "yes" if all(row["within"] for row in mine) else "no")
    return table


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _right(name: str) -> Column:
    return Column(name, justify="right")
