"""`pagestream loadtest degradation`: measures, writes, and compares with another card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from pagestream.loadtest.credentials import Credentials
from pagestream.loadtest.degradation.card import FULL, PARTS, QUICK, disagreements, measure_card
from pagestream.loadtest.degradation.page import write_page
from pagestream.loadtest.degradation.server import Server
from pagestream.loadtest.degradation.tasks import DEPTHS, FILLERS
from pagestream.loadtest.scrape import MetricsPage
from pagestream.loadtest.target import grpc_address

CONFIDENCE = 0.95  # of every interval


class DegradationError(ValueError):
    """What was typed cannot be done; the message says why."""


def draw_card(
    target: str,
    metrics: str,
    folder: Path,
    only: Sequence[str] | None,
    against: Path | None,
    seed: int,
    credentials: Credentials,
    *,
    quick: bool,
    reference: str | None,
    trials: int | None,
) -> bool:
    """Whether it agrees with the other card, that is, no more numbers lie apart than 95 % intervals let; True without
    one. Raises DegradationError and TargetError."""
    console = Console()
    parts = only or PARTS
    if unknown := set(parts) - set(PARTS):
        raise DegradationError(f"{', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if "control" in (only or ()) and reference is None:
        raise DegradationError("control needs a --reference")
    other = _read(against) if against else None
    with ExitStack() as stack:
        server = stack.enter_context(Server(_address(target), credentials))
        control = stack.enter_context(Server(_address(reference), credentials)) if reference else None
        name = Path(server.model()["name"]).name
        document = folder / f"{name}.json"
        kept = _read(document) if only and document.exists() else {}
        if kept and kept["model"] != server.model():
            raise DegradationError(f"{document} is of another model or setting: {kept['model']}")
        effort, page = QUICK if quick else FULL, MetricsPage(metrics, credentials)
        if trials is not None:
            effort = replace(effort, groups=trials, passkey_groups=max(len(FILLERS), trials // len(DEPTHS)))
        card = dict(kept)
        folder.mkdir(parents=True, exist_ok=True)
        for key, value in measure_card(server, parts, effort, page, seed, _progress, control):
            card[key] = value
            if key in PARTS:  # what ends this later takes nothing with it
                document.write_text(json.dumps(card, indent=1) + "\n")
    for path in (document, *write_page(card, folder, name)):
        console.print(path)
    return other is None or _compare(console, other, {part: card[part] for part in parts if part in card})


def _address(target: str) -> str:
    address = grpc_address(target)
    if address is None:
        raise DegradationError(f"{target!r} is not grpc://HOST:PORT")
    return address


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DegradationError(f"{path} is no card: {error}") from error
    if not isinstance(document, dict) or "model" not in document:
        raise DegradationError(f"{path} is no card")
    return document


def _compare(console: Console, before: dict[str, Any], after: dict[str, Any]) -> bool:
    common, apart = disagreements(before, after)
    if not common:
        raise DegradationError("the other card has no number in common with this one")
    console.print(f"{common - len(apart)} of {common} numbers agree within their 95 % intervals")
    for each in apart:
        console.print(
            f"{each.where}: {each.before.value:.4g} ({each.before.lower:.4g} to {each.before.upper:.4g}) then, "
            f"{each.after.value:.4g} ({each.after.lower:.4g} to {each.after.upper:.4g}) now"
        )
    return len(apart) <= (1 - CONFIDENCE) * common


def _progress(items: Iterable[Any], total: int, name: str) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(items, description=name, total=total, console=console, transient=True, disable=not console.is_terminal)
