"""Figures of what happens while a run lasts: the victim of a long prompt, load against latency, the server's pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pagestream.loadtest.figure import COLORS, GREY, duration, new_figure, seconds_axis
from pagestream.loadtest.measures import Objectives
from pagestream.loadtest.record import Record
from pagestream.loadtest.statistics import CTX, ctx_of

_WINDOWS = 8  # that a run is cut into


def draw_victim(records: Sequence[Record]) -> Figure | None:
    """The gaps of the stream that a longer prompt stalled most, and when long prompts were being read."""
    stalls = [(_worst_stall(records, record), record) for record in records if len(record.tokens) > 2]
    stall, victim = max(stalls, key=lambda each: each[0], default=(0.0, None))
    if victim is None or stall <= 0:
        return None
    figure, axes = new_figure(f"A stream of {victim.prompt_tokens} tokens while longer prompts are read")
    stamps = np.array(victim.tokens)
    gaps = np.diff(stamps)
    intruders = _readers(records, victim, float(stamps[0]), float(stamps[-1]))
    for number, reader in enumerate(intruders):
        label = "a longer prompt is read" if number == 0 else None
        begin, end = max(_read_from(reader), float(stamps[0])), min(reader.tokens[0], float(stamps[-1]))
        axes.axvspan(begin, end, color=COLORS[1], alpha=0.18, linewidth=0, label=label)
    axes.vlines(stamps[1:], 0, gaps, color=COLORS[0], linewidth=1)
    axes.plot(stamps[1:], gaps, "o", label="gap before each token")
    axes.axhline(float(np.median(gaps)), color=GREY, linestyle="--", linewidth=1, label="median")
    longest = max((reader.prompt_tokens for reader in intruders), default=0)
    axes.set_title(axes.get_title(loc="left") + f" (up to {longest:,})")
    axes.set_xlabel("seconds of the run")
    axes.set_ylabel("gap")
    axes.yaxis.set_major_formatter(lambda value, _: duration(round(value, 6)))
    axes.margins(y=0.3)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", ncols=3)
    return figure


def _worst_stall(records: Sequence[Record], record: Record) -> float:
    """Its longest gap in which a longer prompt was read, less its median gap."""
    gaps = [later - earlier for earlier, later in pairwise(record.tokens) if _readers(records, record, earlier, later)]
    return max(gaps, default=0.0) - float(np.median(np.diff(record.tokens)))


def _read_from(record: Record) -> float:
    """When its prompt began to be read."""
    return record.tokens[0] - (record.server.prefill if record.server else record.time_to_first_token)


def _readers(records: Sequence[Record], victim: Record, begin: float, end: float) -> list[Record]:
    """Requests with longer prompts that were being read in this interval."""
    longer = (record for record in records if record.prompt_tokens >= 2 * victim.prompt_tokens)
    return [record for record in longer if _read_from(record) < end and record.tokens[0] > begin]


@dataclass(frozen=True)
class _Window:
    """A slice of a run."""

    rate: float  # requests per second that were sent
    tokens_per_second: float
    records: list[Record]  # sent in it


def _windows(run: Sequence[Record]) -> list[_Window]:
    last = max((record.sent for record in run), default=0.0)
    if last <= 0:
        return []
    edges = np.linspace(0.0, last + 1e-9, _WINDOWS + 1)
    stamps = np.array([stamp for record in run for stamp in record.tokens])
    windows = []
    for begin, end in pairwise(edges):
        inside = [record for record in run if begin <= record.sent < end]
        tokens = int(((stamps >= begin) & (stamps < end)).sum())
        windows.append(_Window(len(inside) / (end - begin), tokens / (end - begin), inside))
    return windows


def draw_throughput(runs: Sequence[Sequence[Record]]) -> Figure | None:
    """Each point is a window of a run: what the server gave all in all, and what it cost a request of that length."""
    windows = [window for run in runs for window in _windows(run)]
    figure, axes = new_figure("Throughput and time to first token, by length of the prompt")
    drawn = False
    for ctx in CTX:
        points = []
        for window in windows:
            mine = [
                each for each in window.records if each.is_clean and each.tokens and ctx_of(each.prompt_tokens) == ctx
            ]
            if mine:
                median = float(np.median([record.time_to_first_token for record in mine]))
                points.append((window.tokens_per_second, median))
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o", alpha=0.7, label=f"≤ {ctx} tokens")
            drawn = True
    seconds_axis(axes.yaxis, "first token after (median)")
    axes.set_xlabel(f"output tokens per second, all requests ({_WINDOWS} windows of each run)")
    axes.legend()
    return figure if drawn else None


def draw_goodput(runs: Sequence[Sequence[Record]], objectives: Objectives) -> Figure | None:
    """The share within the objectives against how many requests are sent."""
    windows = [window for run in runs for window in _windows(run)]
    limits = {"ttft": objectives.ttft, "gap": objectives.itl, "tpot": objectives.tpot, "e2e": objectives.e2e}
    told = ", ".join(f"{name} ≤ {duration(limit)}" for name, limit in limits.items() if limit is not None)
    figure, axes = new_figure(f"Goodput: share of requests within {told or 'no objective but an answer'}")
    drawn = False
    for ctx in CTX:
        points = []
        for window in windows:
            mine = [record for record in window.records if record.fault is None and ctx_of(record.prompt_tokens) == ctx]
            if mine:
                points.append((window.rate, sum(map(objectives.met_by, mine)) / len(mine)))
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o", alpha=0.7, label=f"≤ {ctx} tokens")
            drawn = True
    axes.set_xlabel(f"requests sent per second ({_WINDOWS} windows of each run)")
    axes.set_ylabel("share")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(-0.03, 1.05)
    axes.legend()
    return figure if drawn else None


def draw_server(gauges: Sequence[dict[str, float]]) -> Figure | None:
    """The KV pool, who runs and waits, and preemptions, as /metrics told them."""
    if len(gauges) < 2:
        return None
    at = [line["at"] for line in gauges]
    figure, (pool, load) = plt.subplots(2, 1, figsize=(7, 5.2), layout="constrained", sharex=True)
    pool.set_title("The server while the run lasts")
    pool.fill_between(at, [line["pagestream_kv_cache_usage_ratio"] for line in gauges], alpha=0.3, linewidth=0)
    pool.plot(at, [line["pagestream_kv_cache_usage_ratio"] for line in gauges], label="KV pool in use")
    pool.yaxis.set_major_formatter(lambda value, _: f"{value * 100:g} %")
    pool.margins(y=0.4)
    pool.set_ylim(bottom=0)
    preempted = np.diff([line["pagestream_preemptions_total"] for line in gauges])
    for number, place in enumerate(np.flatnonzero(preempted)):
        label = "preemptions" if number == 0 else None
        pool.axvline(at[int(place) + 1], color=COLORS[3], linewidth=1, label=label)
    pool.legend(loc="upper right", title=f"{int(preempted.sum())} preemptions", title_fontsize=8.5)
    load.step(at, [line["pagestream_running_requests"] for line in gauges], where="post", label="running")
    load.step(at, [line["pagestream_waiting_requests"] for line in gauges], where="post", label="waiting")
    load.set_xlabel("seconds of the run")
    load.set_ylabel("requests")
    load.set_ylim(bottom=0)
    load.legend(loc="upper right")
    return figure
