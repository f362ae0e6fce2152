"""Runs against a real server: everything that was sent is accounted for, and both sides count the same."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner, Result

from pagestream.loadtest.cli import app
from pagestream.loadtest.record import Record, read_records
from pagestream.loadtest.scrape import Histogram
from pagestream.loadtest.statistics import QUANTILES, ctx_of
from pagestream.server.__main__ import app as pagestream
from pagestream.server.metric_families import MEAN_GAP_SECONDS, SECONDS
from tests.support.certificates import make_pair
from tests.support.process import ServerProcess


@pytest.fixture(scope="module")
def server(serve: Callable[..., ServerProcess], tiny_model_path: Path) -> ServerProcess:
    return serve(tiny_model_path, "--threads", "1", "--kv-memory", "64MiB")


def run(server: ServerProcess, folder: Path, *arguments: str) -> tuple[dict[str, Any], list[Record]]:
    metrics = f"http://{server.http_address}/metrics"
    where = ["--target", f"grpc://{server.address}", "--metrics", metrics, "--out", str(folder)]
    result = CliRunner().invoke(app, ["run", *arguments, *where])
    assert result.exit_code == 0, result.output
    return json.loads((folder / "summary.json").read_text()), list(read_records(folder / "requests.jsonl"))


def test_server_and_client_agree_under_a_bimodal_load(server: ServerProcess, tmp_path: Path) -> None:
    shape = "bimodal:short=40,long=900,share=0.3,output=12"
    summary, records = run(
        server, tmp_path / "run", shape, "--arrivals", "poisson:rate=12", "--seconds", "3", "--workers", "2"
    )
    assert summary["outcomes"]["ok"] == summary["requests"] == len(records) > 12
    assert {record.session for record in records} == set(range(len(records)))
    assert {(record.prompt_tokens, record.output_tokens) for record in records} == {(40, 12), (900, 12)}
    rows = summary["agreement"]
    assert {row["ctx"] for row in rows} == {"256", "1024"}
    assert all(row["client_count"] == row["server_count"] > 0 for row in rows), rows
    told: dict[tuple[str, str], list[float]] = {}
    ways, paces = [], []  # by how much the client's times are longer
    for record in records:
        assert record.server is not None
        ctx, first, gap = ctx_of(record.prompt_tokens), record.server.time_to_first_token, record.server.decode / 11
        told.setdefault(("ttft", ctx), []).append(first)
        told.setdefault(("tpot", ctx), []).append(gap)
        ways.append(record.time_to_first_token - first)
        paces.append((record.tokens[-1] - record.tokens[0]) / 11 - gap)
    for row in (row for row in rows if row["measure"] != "itl"):
        edges = {"ttft": SECONDS, "tpot": MEAN_GAP_SECONDS}[row["measure"]]
        engine = Histogram.of(told[row["measure"], row["ctx"]], (*edges, math.inf)).quantile(QUANTILES[row["quantile"]])
        if row["measure"] == "tpot":  # the engine's own
            assert row["server"] == pytest.approx(engine), row
        else:  # the engine has a token, then gRPC has it, then the client: whatever the machine does, in this order
            assert engine <= row["server"] <= row["client"], row
    assert 0 < min(ways) < 0.05  # more only where something else runs
    assert min(map(abs, paces)) < 0.005
    foretold = Counter(ctx_of(r.prompt_tokens) for r in records if r.server and r.server.predicted_time_to_first_token)
    assert {ctx: each["count"] for ctx, each in summary["first_token_over_forecast"].items()} == foretold
    assert foretold["256"] > 0
    assert summary["server"]["pagestream_output_tokens_total"] == 12 * len(records)
    drawn = CliRunner().invoke(app, ["plot", str(tmp_path / "run")])
    assert drawn.exit_code == 0, drawn.output
    names = {path.stem for path in (tmp_path / "run" / "plots").glob("*.png")}
    assert len(names | {"4-victim"}) == 9  # chance decides whether a long prompt stalled anybody
    assert all((tmp_path / "run" / "plots" / f"{name}.svg").read_text().startswith("<?xml") for name in names)


def test_faults_end_and_nothing_is_left(server: ServerProcess, tmp_path: Path) -> None:
    faults = "cancel=0.2,deadline=0.2,slow=0.1,kill=0.2"
    arguments = ("fixed:prompt=60,output=10", "--faults", faults, "--arrivals", "closed:concurrency=6")
    summary, records = run(server, tmp_path / "run", *arguments, "--requests", "60", "--workers", "2")
    assert sorted(record.session for record in records) == list(range(60))
    assert sum(summary["outcomes"].values()) == summary["requests"] == 60
    left = {"cancel": "cancelled", "kill": "killed"}
    for record in records:
        allowed = {left[record.fault]} if record.fault in left else {"ok"} | {"deadline"} & {record.fault}
        assert record.outcome in allowed, record
        assert len(record.tokens) == record.output_tokens
        assert record.output_tokens == 10 or record.outcome != "ok"
        assert record.sent <= record.ended
    assert {"cancel", "deadline", "slow", "kill"} == set(summary["faults"])
    server.wait_until_idle()


def test_conversations_grow_and_hit_the_prefix_cache(server: ServerProcess, tmp_path: Path) -> None:
    shape = "multi-turn:turns=3,user=40,output=8"
    _, records = run(server, tmp_path / "run", shape, "--arrivals", "closed:concurrency=2", "--requests", "3")
    assert sorted((record.session, record.turn, record.prompt_tokens) for record in records) == [
        (session, turn, 40 + turn * 48) for session in range(3) for turn in range(3)
    ]
    assert all(record.cached_tokens >= 32 for record in records if record.turn)


def test_the_same_seed_sends_the_same_whoever_sends_it(server: ServerProcess, tmp_path: Path) -> None:
    sent = []
    for workers in ("1", "2"):
        arguments = ("bimodal:short=10,long=30,share=0.5,output=2", "--arrivals", "constant:rate=40", "--seconds", "1")
        _, records = run(server, tmp_path / workers, *arguments, "--workers", workers, "--requests", "20")
        sent.append(sorted((record.session, record.prompt_tokens, record.scheduled) for record in records))
    assert sent[0] == sent[1]
    assert len(sent[0]) == 20


class Vanishing(BaseHTTPRequestHandler):
    """Metrics of a server that dies after the first look."""

    looks: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(503 if self.looks else 200)
        self.looks.append(self.path)
        self.end_headers()


def test_what_was_measured_is_kept_when_the_server_is_gone(server: ServerProcess, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Vanishing) as page:
        threading.Thread(target=page.serve_forever, args=(0.01,), daemon=True).start()
        where = ["--target", f"grpc://{server.address}", "--metrics", f"http://127.0.0.1:{page.server_port}"]
        result = invoke("run", "fixed:prompt=9,output=2", "--requests", "3", *where, "--out", str(tmp_path / "run"))
        page.shutdown()
    assert result.exit_code == 4
    assert "3 requests" in result.output
    assert "the server was gone at the end" in result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["outcomes"]["ok"] == 3


def test_a_locked_server_is_measured_with_its_certificate_and_a_token(
    serve: Callable[..., ServerProcess], tiny_model_path: Path, tmp_path: Path
) -> None:
    """The client shows a certificate of its own too; the numbers of /metrics come over https."""
    authority = make_pair(tmp_path, "authority")
    own = make_pair(tmp_path, "own", authority)
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[key]]\nname = "load"\nmetrics = true\nsha256 = "{hashlib.sha256(b"secret").hexdigest()}"\n')
    lock = ("--tls-cert", own.cert, "--tls-key", own.key, "--tls-client-ca", authority.cert, "--keys-file", keys)
    server = serve(tiny_model_path, "--threads", "1", "--kv-memory", "8MiB", *map(str, lock), "--host", "localhost")
    proof = ("--tls-ca", authority.cert, "--tls-cert", own.cert, "--tls-key", own.key)
    arguments = ["run", "fixed:prompt=20,output=3", "--requests", "4", "--target", f"grpc://{server.address}"]
    arguments += ["--metrics", f"https://{server.http_address}/metrics", *map(str, proof)]
    folder = tmp_path / "run"
    result = invoke(*arguments, "--faults", "kill=0.5", "--out", str(folder), env={"PAGESTREAM_TOKEN": "secret"})
    assert result.exit_code == 0, result.output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["requests"] == 4
    assert summary["server"]["pagestream_grpc_server_started_total"] >= 4
    assert all("secret" not in file.read_text() for file in folder.iterdir())
    assert invoke(*arguments, "--token", "other").exit_code == 4
    assert invoke(*arguments[:-6], "--token", "secret").exit_code == 4
    quick = ["degradation", "--quick", *arguments[4:], "--token", "secret", "--out", str(tmp_path)]
    card = invoke(*quick, "--only", "latency", "--only", "interference")
    assert card.exit_code == 0, (card.output, card.exception)


def test_the_command_is_there_and_a_server_does_without_it() -> None:
    assert "SCENARIO" in CliRunner().invoke(pagestream, ["loadtest", "run", "--help"]).output
    look = "import sys, pagestream.server.__main__; sys.exit(any('loadtest' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0


def invoke(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(app, arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("fixed:promt=3",), 2, "'promt=3' is none of prompt=…, output=…"),
        (("fixed", "--faults", "cancel=2"), 2, "fractions must be from 0 to 1"),
        (("fixed", "--workers", "3"), 2, "3 workers for a concurrency of 1"),
        (("trace:file=/nowhere",), 2, "cannot read /nowhere"),
        (("fixed", "--target", "localhost:1"), 2, "is no target"),
        (("fixed", "--target", "grpc://localhost:99999"), 2, "'grpc://localhost:99999' is no target"),
        (("fixed", "--target", "grpc://[::1]:1"), 4, "no pagestream server answers at [::1]:1"),
        (("fixed", "--target", "grpc://127.0.0.1:1"), 4, "no pagestream server answers at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(arguments: tuple[str, ...], code: int, sentence: str) -> None:
    result = invoke("run", *arguments, "--no-server-metrics")
    assert result.exit_code == code, result.output
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
