"""`pagestream top` and `pagestream estimate`: what a reading of the server says in a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from rich.console import Console
from typer.testing import CliRunner

from pagestream.server.__main__ import app
from pagestream.server.estimate import sentences
from pagestream.server.live import live_json
from pagestream.server.metrics import Metrics
from pagestream.server.snapshot import EngineSnapshot
from pagestream.server.top import Document, quantile, view
from pagestream.v1.insight_pb2 import EstimateResponse
from tests.support.process import ServerProcess


def read(metrics: Metrics) -> Document:
    document: Document = json.loads(live_json(metrics))
    return document


def shown(now: Document, before: Document | None, seconds: float | None) -> list[str]:
    console = Console(width=120, record=True, file=StringIO())
    console.print(view(now, before, seconds))
    return console.export_text().splitlines()


def test_it_shows_what_happened_between_two_readings(make_metrics: Callable[..., Metrics]) -> None:
    metrics = make_metrics()
    metrics.observe_first_delta(5000, 30.0)  # before the window
    before = read(metrics)
    for _ in range(4):
        metrics.observe_first_delta(200, 0.015)
    metrics.observe_gaps([300] * 20, [0.0075] * 20)
    metrics.snapshot = EngineSnapshot(running_contexts=(5, 600), free_blocks=75, active_blocks=25)
    lines = shown(read(metrics), before, 10.0)
    assert lines[0].startswith("m · ")
    assert lines[1] == "2 running · 0 waiting · KV 25% · 2 tokens/s · 0 prompt tokens/s"
    assert lines[2] == "stalled by nobody"
    rows = {line.split("  ")[0].strip(): line.split() for line in lines if line.strip().startswith("≤")}
    assert set(rows) == {"≤ 256", "≤ 512"}, "nothing came of longer ones meanwhile"
    assert rows["≤ 256"][2:7] == ["4", "15", "ms", "19.5", "ms"]  # between the edges 10 and 20 ms
    assert "≤ 8,192" in "\n".join(shown(read(metrics), None, None)), "but since the start"


def test_quantiles_are_those_of_prometheus() -> None:
    assert quantile([1.0, 2.0], [0, 0, 0], 0.5) is None
    assert quantile([1.0, 2.0], [2, 4, 4], 0.5) == pytest.approx(1.0)
    assert quantile([1.0, 2.0], [2, 4, 4], 0.75) == pytest.approx(1.5)
    assert quantile([1.0, 2.0], [0, 0, 4], 0.5) == 2.0


def test_a_forecast_in_words() -> None:
    found = EstimateResponse(prompt_tokens=3000, cached_tokens=1024)
    assert sentences(found)[0] == "3,000 prompt tokens, 1,024 of them cached"
    assert "no forecast yet" in sentences(found)[1]
    found.time_to_first_token.CopyFrom(Duration(seconds=1, nanos=500_000_000))
    found.gap_after.CopyFrom(Duration(nanos=8_000_000))
    found.extrapolated = True
    assert sentences(found)[1] == "first token after 1.5 s, 0 s of it behind others; then one every 8 ms"
    assert len(sentences(found)) == 4


def test_both_ask_a_real_server(serve: Callable[..., ServerProcess], tiny_model_path: Path) -> None:
    server = serve(tiny_model_path, "--threads", "1", "--kv-memory", "16MiB")
    run = CliRunner().invoke
    assert "running" in run(app, ["top", f"http://{server.http_address}", "--once"]).output
    assert "prompt tokens" in run(app, ["estimate", "--raw", "a b c", "--address", server.address]).output
    assert run(app, ["top", "http://127.0.0.1:1", "--once"]).exit_code == 4
    assert run(app, ["estimate", "a", "--address", "127.0.0.1:1"]).exit_code == 4
