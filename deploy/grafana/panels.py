"""What the dashboards are written in: panels in rows, as Grafana's JSON. Knows no metric."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]
Kind = Literal["timeseries", "stat", "bargauge", "heatmap", "text"]

_GRID = 24  # columns of Grafana's grid
_SCHEMA = 39  # of Grafana 11; later ones migrate it themselves
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """`queries` maps a legend, which may name labels as {{ctx}}, to an expression. A bar gauge and a stat show now."""

    title: str
    caveat: str  # what the numbers are, and what they must not be taken for
    queries: dict[str, str]
    unit: str = "s"
    kind: Kind = "timeseries"
    width: int = 8
    stacked: bool = False
    log_scale: bool = False
    limit: float | None = None  # red from here on


@dataclass(frozen=True)
class Row:
    question: str
    panels: Sequence[Panel]


def text(title: str, markdown: str) -> Panel:
    return Panel(title, markdown, {}, kind="text", width=_GRID)


def dashboard(uid: str, title: str, rows: Iterable[Row]) -> Json:
    """A dashboard with the variables $model and $instance."""
    panels: list[Json] = []
    y = 0
    for row in rows:
        header = {"type": "row", "title": row.question, "collapsed": False, "panels": []}
        panels.append(header | {"gridPos": _at(0, y, _GRID, 1)})
        x, y, tallest = 0, y + 1, 0
        for panel in row.panels:
            height = {"stat": 4, "text": 5}.get(panel.kind, 8)
            if x + panel.width > _GRID:
                x, y, tallest = 0, y + tallest, 0
            panels.append(_panel(panel) | {"gridPos": _at(x, y, panel.width, height)})
            x, tallest = x + panel.width, max(tallest, height)
        y += tallest
    for number, built in enumerate(panels, start=1):
        built["id"] = number
    return {
        "uid": uid,
        "title": title,
        "tags": ["pagestream"],
        "schemaVersion": _SCHEMA,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [_siblings()],
        "templating": {"list": [_datasource(), _variable("model"), _variable("instance")]},
        "panels": panels,
    }


def _at(x: int, y: int, width: int, height: int) -> Json:
    return {"x": x, "y": y, "w": width, "h": height}


def _siblings() -> Json:
    """A menu of the other dashboards, at the same time and with the same variables."""
    switches = {"asDropdown": True, "keepTime": True, "includeVars": True, "targetBlank": False}
    return {"type": "dashboards", "tags": ["pagestream"], "title": "pagestream", "icon": "", "tooltip": "", **switches}


def _datasource() -> Json:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variable(label: str) -> Json:
    return {
        "name": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": f"label_values(pagestream_running_requests, {label})",
        "refresh": 2,  # whenever the time range changes
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(panel: Panel) -> Json:
    if panel.kind == "text":
        return {"type": "text", "title": panel.title, "options": {"mode": "markdown", "content": panel.caveat}}
    instant = panel.kind in {"bargauge", "stat"}
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _SOURCE,
            "expr": expression,
            "legendFormat": legend,
            "instant": instant,
            "range": not instant,
            "format": "heatmap" if panel.kind == "heatmap" else "time_series",
        }
        for index, (legend, expression) in enumerate(panel.queries.items())
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.caveat,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
    }


def _defaults(panel: Panel) -> Json:
    steps: list[Json] = [{"color": "green", "value": None}]
    if panel.limit is not None:
        steps.append({"color": "red", "value": panel.limit})
    defaults: Json = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "scaleDistribution": {"type": "log", "log": 2} if panel.log_scale else {"type": "linear"},
            "thresholdsStyle": {"mode": "off" if panel.limit is None else "line"},
        }
        if not panel.log_scale:
            defaults["custom"]["axisSoftMin"] = 0  # a cut axis makes a little look like much
    return defaults


def _options(panel: Panel) -> Json:
    match panel.kind:
        case "timeseries":
            legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
            return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
        case "heatmap":
            return {"calculate": False, "yAxis": {"unit": panel.unit}, "color": {"mode": "scheme", "scheme": "Turbo"}}
        case "bargauge":
            return {"orientation": "horizontal", "displayMode": "basic", "reduceOptions": {"calcs": ["lastNotNull"]}}
        case _:
            return {"colorMode": "value", "graphMode": "none", "reduceOptions": {"calcs": ["lastNotNull"]}}
