"""The live page and its data: the numbers of /metrics as JSON, from the same reading. The server keeps no history."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from pagestream.server.histogram import HistogramReading
from pagestream.server.metric_families import FAMILIES, Family
from pagestream.server.metrics import Metrics, Reading

_FOLDER = Path(__file__).parent / "page"
_STYLES = ("vendor/uPlot.min.css", "page.css")
_SCRIPTS = ("vendor/uPlot.iife.min.js", "data.js", "charts.js", "views.js", "panels.js", "page.js")


def live_page() -> str:
    """One HTML document with styles and scripts inside, so that it needs no other address and no build."""
    page = Template((_FOLDER / "index.html").read_text(encoding="utf-8"))
    return page.substitute(style=_joined(_STYLES), script=_joined(_SCRIPTS))


def live_json(metrics: Metrics) -> str:
    """{state, model, families, recent}: a family is {labels, series}, and edges if it is a histogram. A series is
    [label values, value], or [label values, cumulative counts, sum] of a histogram; those without samples are left out.
    """
    reading = metrics.read()
    document = {
        "state": metrics.status().state.value,
        "model": reading.model,
        "families": {family.name: _family(family, reading) for family in FAMILIES},
        "recent": [asdict(request) | {"ended": age} for age, request in metrics.recent.newest_first()],
    }
    return json.dumps(document, separators=(",", ":"))


def _joined(names: tuple[str, ...]) -> str:
    return "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in names)


def _family(family: Family, reading: Reading) -> dict[str, Any]:
    labels = list(family.labels)
    nothing = family.per_model and reading.model is None
    if family.kind == "histogram":
        series = [] if nothing else _histogram(family, reading.histograms[family.name])
        return {"labels": labels, "edges": family.edges, "series": series}
    values = [] if nothing else reading.values[family.name].items()
    return {"labels": labels, "series": [(key, value if math.isfinite(value) else None) for key, value in values]}


def _histogram(family: Family, reading: HistogramReading) -> list[tuple[Any, ...]]:
    rows = zip(family.series, reading.counts.tolist(), reading.sums.tolist(), strict=True)
    return [row for row in rows if row[1][-1]]
