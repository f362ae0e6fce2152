"""Quantiles by context: what a real Prometheus makes of the server's histograms beside what its clients measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import stack
from typer.testing import CliRunner

from pagestream.loadtest.cli import app
from pagestream.loadtest.statistics import QUANTILES
from pagestream.loadtest.summary import SERVER_HISTOGRAMS
from tests.support.process import ServerProcess
from tests.support.waiting import wait_until
from tests.support.watching import Prometheus, free_ports

pytestmark = pytest.mark.slow
SCRAPE = 'global: {scrape_interval: 1s}\nscrape_configs: [{job_name: server, static_configs: [{targets: ["%s"]}]}]\n'


def test_prometheus_tells_what_the_clients_report_compares_itself_with(
    serve: Callable[..., ServerProcess], tiny_model_path: Path, tmp_path: Path
) -> None:
    """That those quantiles lie between the engine's own and the client's is in loadtest/test_run.py: a chain of three
    that no machine's speed can break."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    server = serve(tiny_model_path, "--threads", "1", "--kv-memory", "64MiB")
    (tmp_path / "prometheus.yml").write_text(SCRAPE % server.http_address)
    (port,) = free_ports(1)
    process = subprocess.Popen(stack.prometheus_command(tmp_path, port))
    try:
        stack.wait_until_ready(f"http://127.0.0.1:{port}/-/ready", process)
        prometheus = Prometheus(port)
        shape = "bimodal:short=40,long=900,share=0.3,output=12"
        target = ["--target", f"grpc://{server.address}", "--metrics", f"http://{server.http_address}/metrics"]
        load = ["run", shape, "--arrivals", "closed:concurrency=4", "--requests", "40", *target]
        result = CliRunner().invoke(app, [*load, "--out", str(tmp_path / "run")])
        assert result.exit_code == 0, result.output
        rows = json.loads((tmp_path / "run" / "summary.json").read_text())["agreement"]
        assert {(row["measure"], row["ctx"]) for row in rows} == {
            (measure, ctx) for measure in SERVER_HISTOGRAMS for ctx in ("256", "1024")
        }
        for row in rows:
            name, ctx = SERVER_HISTOGRAMS[row["measure"]], row["ctx"]
            count = f'sum({name}_count{{ctx="{ctx}"}})'
            wait_until(lambda: prometheus.query(count) == [row["client_count"]], f"{count} is what clients counted")  # noqa: B023
            quantile = f'histogram_quantile({QUANTILES[row["quantile"]]}, sum by (le) ({name}_bucket{{ctx="{ctx}"}}))'
            assert prometheus.query(quantile) == [pytest.approx(row["server"], rel=1e-9)], quantile
    finally:
        stack.stop(process)
