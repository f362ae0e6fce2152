"""`pagestream top` and `pagestream estimate`: what a reading of the server says in a terminal."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from rich.console import Console
from typer.testing import CliRunner, Result

from pagestream.server.__main__ import app
from pagestream.server.estimate import sentences
from pagestream.server.http import HttpServer, start_http
from pagestream.server.keys import KeyFile
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
    assert lines[1] == "2 running · 0 waiting · KV pool 25% in use · 2 tokens/s · 0 prompt tokens/s"
    assert lines[2] == "stalled by nobody"
    rows = {line.split("  ")[0].strip(): line.split() for line in lines if line.strip().startswith("≤")}
    assert set(rows) == {"≤ 256", "≤ 512"}, "nothing came of longer ones meanwhile"
    assert rows["≤ 256"][2:7] == ["4", "15", "ms", "19.5", "ms"]  # between the edges 10 and 20 ms
    assert "≤ 8,192" in "\n".join(shown(read(metrics), None, None)), "but since the start"


def test_a_server_that_loads_its_model_can_be_watched() -> None:
    assert shown(read(Metrics()), None, None)[0] == "no model · loading"


@pytest.fixture
def http(make_metrics: Callable[..., Metrics], tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Starts HTTP ports that want the token of a key."""
    opened: list[HttpServer] = []

    def start(token: str) -> str:
        file = tmp_path / "keys.toml"
        file.write_text(
            f'[[key]]\nname = "w"\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\nmetrics = true\n'
        )
        opened.append(start_http(0, "127.0.0.1", make_metrics(), keys=KeyFile(file)))
        return f"http://127.0.0.1:{opened[-1].port}"

    yield start
    for server in opened:
        server.close()


def test_a_locked_server_is_watched_with_the_token_of_a_key(http: Callable[[str], str]) -> None:
    run, url = CliRunner().invoke, http("watcher")
    assert "running" in run(app, ["top", url, "--once", "--token", "watcher"]).output
    assert (
        "running"
        in run(app, ["top", url.removeprefix("http://"), "--once"], env={"PAGESTREAM_TOKEN": "watcher"}).output
    )
    for options in ([], ["--token", "client"]):
        refused = run(app, ["top", url, "--once", *options])
        assert refused.exit_code == 4
        assert "the token of a key with metrics = true is needed" in refused.stderr


class Stranger(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # the base class's name
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "success"}')

    def log_message(self, *_: object) -> None: ...


def test_another_programs_port_is_named_in_one_sentence() -> None:
    with HTTPServer(("127.0.0.1", 0), Stranger) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        says_nothing(CliRunner().invoke(app, ["top", url, "--once"]), url)
        other.shutdown()


def says_nothing(result: Result, url: str) -> None:
    assert result.exit_code == 4
    assert result.stderr.startswith(f"pagestream: nothing to watch at {url} (")
    assert result.stderr.count("\n") == 1


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
    for url in ("http://127.0.0.1:1", f"http://{server.address}"):  # nobody's, and the port for gRPC
        says_nothing(run(app, ["top", url, "--once"]), url)
    assert run(app, ["estimate", "a", "--address", "127.0.0.1:1"]).exit_code == 4
