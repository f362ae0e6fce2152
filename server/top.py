"""`pagestream top`: who runs and waits, what first tokens and gaps take by context, whose prompts stall others. Reads
/live.json of the HTTP port, as the live page does."""

from __future__ import annotations

import json
import math
import ssl
import time
import urllib.request
from collections import deque
from http.client import HTTPException
from typing import Annotated, Any
from urllib.error import HTTPError

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table

from pagestream.server.client import Credentials
from pagestream.server.metric_families import CTX
from pagestream.server.options import TlsCa, TlsCert, TlsKey, Token

UNREACHABLE = 4  # exit code; 0 is the user's leaving
_WINDOW = 60.0  # seconds that rates and quantiles are of
_RECENT = 8  # requests shown
_SECONDS = 3.0  # for an answer

Document = dict[str, Any]


def top(
    url: Annotated[str, typer.Argument(help="Of the server's HTTP port.")] = "http://localhost:8080",
    *,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print what there is since the start, and end.")] = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
) -> None:
    """Watches a server in the terminal; Ctrl-C leaves. Times are of the last minute.

    Where the server has keys, the token is that of a key with [bold]metrics = true[/].

    Example: [bold]pagestream top http://gpu-box:8080[/]
    """
    console = Console()
    try:
        page = LivePage(url, Credentials(tls_ca, tls_cert, tls_key, token))
        if once:
            console.print(view(page.read(), None, None))
            return
        readings = deque([(time.monotonic(), page.read())])
        with Live(console=console, screen=True, auto_refresh=False) as screen:
            while True:
                (begun, before), (at, now) = readings[0], readings[-1]
                screen.update(view(now, before, at - begun) if at > begun else view(now, None, None), refresh=True)
                time.sleep(interval)
                readings.append((time.monotonic(), page.read()))
                while readings[-1][0] - readings[1][0] >= _WINDOW:
                    readings.popleft()
    except (OSError, ValueError) as error:
        typer.echo(f"pagestream: nothing to watch at {url} ({error})", err=True)
        raise typer.Exit(UNREACHABLE) from error
    except KeyboardInterrupt:
        return


class LivePage:
    """A server's /live.json. Raises OSError for files of credentials that cannot be used."""

    def __init__(self, url: str, credentials: Credentials) -> None:
        self._url = f"{(url if '://' in url else f'http://{url}').rstrip('/')}/live.json"
        context = ssl.create_default_context(cafile=credentials.ca)
        if credentials.cert:
            context.load_cert_chain(credentials.cert, credentials.key)
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        self._opener.addheaders += [(name, str(value)) for name, value in credentials.metadata]

    def read(self) -> Document:
        """Raises OSError if nothing answers or the server refuses, ValueError for an answer of another program."""
        try:
            with self._opener.open(self._url, timeout=_SECONDS) as response:
                document: Document = json.load(response)
        except HTTPError as error:
            said = error.read(200).decode(errors="replace").partition("\n")[0]
            raise OSError(f"{error}: {said}") from error
        except HTTPException as error:
            raise ValueError("what answers there speaks no HTTP") from error
        if not isinstance(document, dict) or not {"model", "families"} <= document.keys():
            raise ValueError("what answers there is no pagestream server")
        return document


def view(now: Document, before: Document | None, seconds: float | None) -> RenderableType:
    """What happened between two documents of /live.json, `seconds` apart; without `before`, since the start."""
    rate = ""
    if seconds:
        for name, what in (("output_tokens_total", "tokens"), ("prompt_tokens_total", "prompt tokens")):
            rate += f" · {sum(_grown(now, before, name).values()) / seconds:,.0f} {what}/s"
    stalls = {cause: value for (cause,), value in _grown(now, before, "stall_seconds_total").items() if value}
    requests = [f"{_gauge(now, f'{kind}_requests'):.0f} {kind}" for kind in ("running", "waiting")]
    lines = [
        f"[bold]{now['model'] or 'no model'}[/] · {now['state']}",
        f"{' · '.join(requests)} · KV pool {_gauge(now, 'kv_cache_usage_ratio'):.0%} in use{rate}",
        "stalled by " + (", ".join(f"{cause} {_time(value)}" for cause, value in stalls.items()) or "nobody"),
        f"[dim]of the last {seconds:.0f} s[/]" if seconds else "[dim]since the start[/]",
    ]
    return Group(*lines, _by_context(now, before), _recent(now))


def _by_context(now: Document, before: Document | None) -> Table:
    heads = ("first tokens", "p50", "p95", "gaps", "p50", "p95", "stalled others")
    table = Table("context", *(Column(head, justify="right") for head in heads), box=None)
    names = ("time_to_first_token_seconds", "inter_token_latency_seconds")
    histograms = [_grown(now, before, name) for name in names]
    caused = _grown(now, before, "stall_caused_seconds_total")
    for ctx in CTX:
        cells, seen = [], False
        for name, histogram in zip(names, histograms, strict=True):
            counts = histogram.get((ctx,), [0])
            seen = seen or counts[-1] > 0
            quantiles = [quantile(now["families"][name]["edges"], counts, q) for q in (0.5, 0.95)]
            cells += [f"{counts[-1]:,}", *map(_time, quantiles)]
        if seen:
            table.add_row("longer" if ctx == "inf" else f"≤ {int(ctx):,}", *cells, _time(caused.get((ctx,), 0.0)))
    return table


def _recent(now: Document) -> Table:
    heads = ("prompt", "cached", "answer", "queue", "prefill", "mean gap")
    table = Table("ended", "by", *(Column(head, justify="right") for head in heads), box=None)
    for request in now["recent"][:_RECENT]:
        counts = [f"{request[name]:,}" for name in ("prompt_tokens", "cached_tokens", "output_tokens")]
        times = [_time(request[name]) for name in ("queue", "prefill", "mean_gap")]
        table.add_row(f"{request['ended']:.0f} s ago", request["reason"].replace("_", " "), *counts, *times)
    return table


def _grown(now: Document, before: Document | None, name: str) -> dict[tuple[str, ...], Any]:
    """By label values: what a counter grew by, or the cumulative counts of a histogram."""
    old = _series(before, name) if before else {}
    grown: dict[tuple[str, ...], Any] = {}
    for labels, value in _series(now, name).items():
        if isinstance(value, list):
            grown[labels] = [new - was for new, was in zip(value, old.get(labels, [0] * len(value)), strict=True)]
        else:
            grown[labels] = value - old.get(labels, 0)
    return grown


def _series(document: Document, name: str) -> dict[tuple[str, ...], Any]:
    return {tuple(row[0]): row[1] for row in document["families"][name]["series"]}


def _gauge(document: Document, name: str) -> float:
    return float(sum(_series(document, name).values()))


def quantile(edges: list[float], counts: list[int], q: float) -> float | None:
    """As Prometheus reads it from cumulative counts; the last edge for what lies beyond it. None of none."""
    if not counts[-1]:
        return None
    rank = q * counts[-1]
    place = next(i for i, count in enumerate(counts) if count >= rank)
    if place >= len(edges):
        return edges[-1]
    low, below = (edges[place - 1], counts[place - 1]) if place else (0.0, 0)
    return low + (edges[place] - low) * (rank - below) / (counts[place] - below)


def _time(seconds: float | None) -> str:
    if seconds is None or math.isnan(seconds):
        return "-"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
