"""The card as one HTML page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pagestream.loadtest.degradation.figures import card_figures, measured, overview
from pagestream.loadtest.figure import inline_svg, styled

_PAGE = Path(__file__).with_name("card.html.j2")


def render(card: dict[str, Any]) -> str:
    """The page."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "seconds": _seconds,
        "tokens": _tokens,
        "length": _length,
        "percent": _percent,
        "nats": _nats,
    }
    with styled():
        figures = {name: Markup(inline_svg(figure)) for name, figure in card_figures(card).items()}  # noqa: S704
    return environment.from_string(_PAGE.read_text()).render(card=card, figures=figures, **card)


def write_page(card: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """The page and, of a card with every part, a figure for a README."""
    paths = [folder / f"{name}.html"]
    paths[0].write_text(render(card))
    if all(measured(card, part) for part in ("latency", "dilution", "quality")):
        paths.append(folder / f"{name}.png")
        with styled():
            overview(card).savefig(paths[1], dpi=100)
    return paths


def _seconds(interval: dict[str, float]) -> str:
    """With the unit that suits the value."""
    unit, name = next(
        (
            (unit, name)
            for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
            if interval["value"] >= unit
        ),
        (1e-12, "ps"),
    )
    value, lower, upper = (interval[side] / unit for side in ("value", "lower", "upper"))
    return _unbroken(f"{value:.3g} {name}", f"({lower:.3g} to {upper:.3g})")


def _tokens(interval: dict[str, float]) -> str:
    value, lower, upper = (interval[side] for side in ("value", "lower", "upper"))
    return _unbroken(f"{value:,.0f} tokens", f"({lower:,.0f} to {upper:,.0f})")


def _length(interval: dict[str, float]) -> str:
    """An effective length."""
    return f"up to {_tokens(interval)}" if interval["value"] else "at no tested length"


def _percent(interval: dict[str, float]) -> str:
    value, lower, upper = (interval[side] for side in ("value", "lower", "upper"))
    return _unbroken(f"{value:.0%}", f"({lower:.0%} to {upper:.0%})")


def _nats(interval: dict[str, float]) -> str:
    value, lower, upper = (interval[side] for side in ("value", "lower", "upper"))
    return _unbroken(f"{value:.2f}", f"({lower:.2f} to {upper:.2f})")


def _unbroken(*parts: str) -> str:
    """A line may end between the parts alone."""
    return " ".join(part.replace(" ", "\u00a0") for part in parts)
