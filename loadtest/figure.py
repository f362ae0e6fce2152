"""How figures look: one style for plots of runs and for the card."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#78716c", "#1e293b")
GREY = "#6b7280"
_STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 130,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",  # text stays text: smaller, and searchable
    "svg.hashsalt": "pagestream",  # the same figure, the same bytes
}


@contextmanager
def styled() -> Iterator[None]:
    """Figures made inside look alike, and are closed at its end."""
    with mpl.rc_context(_STYLE):
        try:
            yield
        finally:
            plt.close("all")


def new_figure(title: str, *, width: float = 7.0, height: float = 4.2) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set_title(title)
    return figure, axes


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """As PNG and as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def inline_svg(figure: Figure) -> str:
    """The figure as an element of an HTML page, as wide as there is room."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def token_axis(axes: Axes, label: str) -> None:
    """Lengths in powers of two, written out."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)


def seconds_axis(axis: Axis, label: str | None = None) -> None:
    """Times on a logarithmic axis, in seconds or milliseconds as they come."""
    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: duration(value) if _has_room(axis, value) else ""))
    if label:
        axis.set_label_text(label)


def _has_room(axis: Axis, value: float) -> bool:
    """Along a wide range of times the powers of ten alone."""
    low, high = axis.get_view_interval()
    return high < 2000 * low or f"{value:e}".startswith("1")


def duration(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms"


def tokens(count: float) -> str:
    return f"{count:.0f}" if count < 1024 else f"{count / 1024:g}k"
