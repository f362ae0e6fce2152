"""Two runs of a scenario: which latencies at which lengths changed, and by how much for certain."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pagestream.loadtest.measures import MEASURES, TITLES, gaps_of, length_of, of_request
from pagestream.loadtest.record import Record, read_records
from pagestream.loadtest.statistics import CTX, Array, Interval, ctx_of

_QUANTILES = {"p50": 0.5, "p99": 0.99}
_FEWEST = 5  # requests on each side; fewer say nothing about a percentile
_ROUNDS = 1000


class CompareError(ValueError):
    """There is nothing to compare; the message says why."""


@dataclass(frozen=True)
class Row:
    measure: str
    ctx: str
    quantile: str
    before: float  # seconds
    after: float
    ratio: Interval  # after / before
    requests: tuple[int, int]
    regressed: bool
    improved: bool


@dataclass(frozen=True)
class Comparison:
    paired: bool  # the same requests in both
    threshold: float
    rows: tuple[Row, ...]

    @property
    def regressions(self) -> list[Row]:
        return [row for row in self.rows if row.regressed]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


Groups = dict[int, list[float]]  # session -> its samples: requests, not tokens, are what is independent


def compare_runs(before: Path, after: Path, threshold: float) -> Comparison:
    """Raises CompareError for folders without comparable runs."""
    runs = [_read(before), _read(after)]
    paired = _work_of(before) == _work_of(after)
    rows = []
    for measure in MEASURES:
        earlier, later = (_groups(records, measure) for records in runs)
        for ctx in (each for each in CTX if each in earlier and each in later):
            rows += _compare(measure, ctx, earlier[ctx], later[ctx], threshold, paired=paired)
    if not rows:
        raise CompareError(f"no length has {_FEWEST} clean requests in both {before} and {after}")
    return Comparison(paired, threshold, tuple(rows))


def _read(folder: Path) -> list[Record]:
    try:
        return [record for record in read_records(folder / "requests.jsonl") if record.is_clean and record.tokens]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CompareError(f"{folder} holds no run: {error}") from error


def _work_of(folder: Path) -> tuple[object, ...]:
    """What decides which requests were sent."""
    try:
        plan = json.loads((folder / "manifest.json").read_text())["plan"]
        return tuple(plan[name] for name in ("shape", "faults", "seed"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompareError(f"{folder} holds no manifest: {error}") from error


def _groups(records: Sequence[Record], measure: str) -> dict[str, Groups]:
    """Samples by ctx and session."""
    found: defaultdict[str, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if measure == "itl":
            for context, gap in gaps_of(record):
                found[ctx_of(context)][record.session].append(gap)
        elif (seconds := of_request(record).get(measure)) is not None:
            found[ctx_of(length_of(measure, record))][record.session].append(seconds)
    return {ctx: dict(groups) for ctx, groups in found.items()}


def _compare(measure: str, ctx: str, before: Groups, after: Groups, threshold: float, *, paired: bool) -> list[Row]:
    if paired:
        common = before.keys() & after.keys()
        before, after = ({key: groups[key] for key in sorted(common)} for groups in (before, after))
    if min(len(before), len(after)) < _FEWEST:
        return []
    levels = list(_QUANTILES.values())
    pools = [[np.array(samples) for samples in groups.values()] for groups in (before, after)]
    ratios = np.array([_resampled(pools[0], pools[1], levels, seed, paired=paired) for seed in range(_ROUNDS)])
    rows = []
    for place, (name, level) in enumerate(_QUANTILES.items()):
        old, new = (float(np.quantile(np.concatenate(pool), level)) for pool in pools)
        if old <= 0:  # tokens that travelled together have no gap
            continue
        lower, upper = np.nanquantile(ratios[:, place], (0.025, 0.975))
        ratio = Interval(new / old, float(lower), float(upper))
        worse, better = ratio.lower > 1 + threshold, ratio.upper < 1 / (1 + threshold)
        counts = (len(before), len(after))
        rows.append(Row(measure, ctx, name, old, new, ratio, counts, regressed=worse, improved=better))
    return rows


def _resampled(
    before: Sequence[Array], after: Sequence[Array], levels: list[float], seed: int, *, paired: bool
) -> Array:
    """Ratios [levels] of one bootstrap round over requests; pairs are drawn together."""
    random = np.random.default_rng(seed)
    drawn = random.integers(0, len(before), len(before))
    drawn_after = drawn if paired else random.integers(0, len(after), len(after))
    old = np.quantile(np.concatenate([before[place] for place in drawn]), levels)
    new = np.quantile(np.concatenate([after[place] for place in drawn_after]), levels)
    return np.asarray(np.divide(new, old, out=np.full(len(levels), np.nan), where=old > 0))


def print_comparison(console: Console, comparison: Comparison) -> None:
    how = "request by request" if comparison.paired else "as independent samples: scenario or seed differ"
    console.print(f"compared {how}; worse is beyond {comparison.threshold:.0%}")
    table = Table("seconds", "ctx ≤", "", "before", "after", "ratio", "95 % interval", "requests", "", box=None)
    for row in comparison.rows:
        verdict = "[red]worse[/]" if row.regressed else "[green]better[/]" if row.improved else ""
        interval = f"{row.ratio.lower:.2f} to {row.ratio.upper:.2f}"
        requests = " / ".join(map(str, row.requests))
        values = (f"{row.before:.4f}", f"{row.after:.4f}", f"{row.ratio.value:.2f}", interval, requests, verdict)
        table.add_row(TITLES[row.measure], row.ctx, row.quantile, *values)
    console.print(table)
