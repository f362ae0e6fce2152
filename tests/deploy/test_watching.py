"""A served load, watched by the real Prometheus, Alertmanager and Chromium: rules, dashboards, an alert, the page."""

from __future__ import annotations

import json
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import stack

from pagestream.server.live import live_page
from tests.support.process import ServerProcess
from tests.support.waiting import WAIT, wait_until
from tests.support.watching import Prometheus, free_ports, get_json, traffic

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARDS = sorted(path.stem for path in (GRAFANA / "dashboards").glob("*.json"))

pytestmark = pytest.mark.slow


def need(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")


@pytest.fixture(scope="module")
def server(serve: Callable[..., ServerProcess], tiny_model_path: Path) -> ServerProcess:
    # int8: there speculation is on, and the kernels say how long they took.
    settings = {
        "dtype": "int8",
        "max-running": 3,
        "max-queue-requests": 8,
        "attention-every": 1,
        "canary-interval": 0.1,
    }
    server = serve(tiny_model_path, *(text for name, value in settings.items() for text in (f"--{name}", str(value))))
    wait_until(lambda: server.metric("canary_runs_total", result="ok") > 0, "a canary ran: it gives way to traffic")
    return server


@pytest.fixture(scope="module")
def busy(server: ServerProcess) -> Iterator[ServerProcess]:
    with traffic(server.address, clients=4):
        yield server


@pytest.fixture(scope="module")
def ports(busy: ServerProcess) -> stack.Ports:
    grpc, *others = free_ports(4)
    return stack.Ports(grpc, int(busy.http_address.rpartition(":")[2]), *others)


@pytest.fixture(scope="module")
def config(ports: stack.Ports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As shipped, but each second is a scrape and alerts pass in a twelfth of their time."""
    folder = tmp_path_factory.mktemp("stack")
    stack.write_config(folder, ports)

    def rewrite(name: str, pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> None:
        text, count = re.subn(pattern, replacement, (folder / name).read_text())
        assert count, f"{name} has no {pattern}"
        (folder / name).write_text(text)

    def quicker(match: re.Match[str]) -> str:
        return f"{match[1]}{int(match[2]) * {'s': 1, 'm': 60, 'h': 3600}[match[3]] // 12 or 1}s"

    rewrite("prometheus.yml", r"_interval: 5s", "_interval: 1s")
    rewrite("alertmanager.yml", r"(group_wait|group_interval): \d+s", r"\1: 1s")
    rewrite("alerts.yml", r"(for: |\[|offset )(\d+)([smh])", quicker)
    return folder


@pytest.fixture(scope="module")
def prometheus(config: Path, ports: stack.Ports) -> Iterator[Prometheus]:
    need("prometheus")
    process = subprocess.Popen(stack.prometheus_command(config, ports.prometheus))
    try:
        stack.wait_until_ready(f"http://127.0.0.1:{ports.prometheus}/-/ready", process)
        yield Prometheus(ports.prometheus)
    finally:
        stack.stop(process)


def queries_of(dashboard: dict[str, Any]) -> dict[str, str]:
    """Every expression with the variables that Grafana would put in, by where it stands."""
    found = {}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "30s")
            found[f"{panel['title']} / {target['legendFormat']}"] = re.sub(r"\$(model|instance)", ".+", expression)
    return found


def measured_by(expression: str, rules: dict[str, str]) -> set[str]:
    """Our families that an expression is made of, also through recording rules."""
    recorded = set(re.findall(r"[a-z_]+:pagestream_\w+:\w+", expression))
    rest = re.sub(r"[a-z_]+:pagestream_\w+:\w+", "", expression)
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bpagestream_(\w+)", rest)}
    return names.union(*(measured_by(rules[name], rules) for name in recorded))


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panels_queries_return_data(name: str, busy: ServerProcess, prometheus: Prometheus) -> None:
    rules = {rule["name"]: rule["query"] for rule in prometheus.rules() if rule["type"] == "recording"}
    live = get_json(f"http://{busy.http_address}/live.json")["families"]
    queries = queries_of(json.loads((GRAFANA / "dashboards" / f"{name}.json").read_text()))
    assert {
        where: names for where, query in queries.items() if (names := measured_by(query, rules) - live.keys())
    } == {}
    waiting = set(queries)

    def all_answered() -> bool:
        waiting.difference_update([where for where in waiting if prometheus.query(queries[where])])
        return not waiting

    try:
        wait_until(all_answered, "every query has data")
    except AssertionError:
        pytest.fail(f"no data for {[(where, queries[where]) for where in waiting]}")


def test_every_rule_is_healthy(prometheus: Prometheus) -> None:
    wait_until(lambda: all(rule["health"] != "unknown" for rule in prometheus.rules()), "every rule was evaluated")
    assert [(rule["name"], rule["lastError"]) for rule in prometheus.rules() if rule["health"] != "ok"] == []


def test_a_full_queue_is_an_alert_that_arrives_and_resolves(
    busy: ServerProcess, prometheus: Prometheus, config: Path, ports: stack.Ports
) -> None:
    need("prometheus-alertmanager")
    told: queue.Queue[dict[str, Any]] = queue.Queue()

    def wait_for(status: str) -> dict[str, Any]:
        while True:
            alert = told.get(timeout=2 * WAIT)
            if (alert["labels"]["alertname"], alert["status"]) == ("PagestreamQueueFull", status):
                return alert

    receiver = stack.Receiver(ports.receiver, told.put)
    process = subprocess.Popen(stack.alertmanager_command(config, ports.alertmanager))
    try:
        stack.wait_until_ready(f"http://127.0.0.1:{ports.alertmanager}/-/ready", process)
        with traffic(busy.address, clients=14):
            firing = wait_for("firing")
        assert "turns requests away because its queue is full" in firing["annotations"]["summary"]
        assert firing["labels"]["instance"] == busy.http_address
        wait_for("resolved")
    finally:
        stack.stop(process)
        receiver.close()


PANELS = {  # what each needs, so that it shows data where the server has them and says so where it has not
    "ttft": "time_to_first_token_seconds",
    "gap": "inter_token_latency_seconds",
    "waits": "running_requests",
    "stalls": "stall_seconds_total",
    "effective-context": "attention_rows_total",
    "masses": "attention_rows_total",
    "kv": "kv_blocks",
    "canaries": "canary_logprob",
    "selftest": "selftest_ok",
}


def browse(url: str, width: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """The document after seven seconds on stdout, the console among what is on stderr."""
    need("chromium")
    quiet = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    return subprocess.run(
        ["chromium", "--headless", "--no-sandbox", *quiet, "--enable-logging=stderr", f"--user-data-dir={folder}",
         f"--window-size={width},1000", "--virtual-time-budget=7000", "--dump-dom", url],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_live_page_says_why_it_has_no_numbers(tmp_path: Path) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/" else 503)
            self.end_headers()
            self.wfile.write(live_page().encode() if self.path == "/" else b"not JSON")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        dom = browse(f"http://127.0.0.1:{server.server_port}/", 1280, tmp_path).stdout
        server.shutdown()
    assert "<title>pagestream: unreachable</title>" in dom
    assert "The server answers 503 Service Unavailable." in dom


@pytest.mark.parametrize("width", [390, 1280])
def test_the_live_page_in_a_browser(width: int, busy: ServerProcess, tmp_path: Path) -> None:
    before = get_json(f"http://{busy.http_address}/live.json")["families"]
    page = browse(f"http://{busy.http_address}/", width, tmp_path)
    after = get_json(f"http://{busy.http_address}/live.json")["families"]
    dom = page.stdout
    assert "<title>pagestream: ready</title>" in dom
    assert int(re.search(r'data-polls="(\d+)"', dom)[1]) >= 2  # type: ignore[index]
    assert [line for line in page.stderr.splitlines() if "CONSOLE" in line] == []
    sections = dict(re.findall(r'<section data-panel="([\w-]+)" data-state="(\w+)"', dom))
    assert sections.keys() == PANELS.keys() | {"recent"}
    assert len(re.findall('<p class="caveat">.{40}', dom)) == len(sections)
    for panel, family in PANELS.items():
        if before.get(family, {"series": []})["series"]:
            assert sections[panel] == "data", panel
        elif not after.get(family, {"series": []})["series"]:
            assert sections[panel] == "empty", panel
            assert ("No samples yet" if family in after else f"does not measure pagestream_{family}.") in dom
    assert sections["recent"] == "data"
    assert dom.count("<canvas") >= 3
    assert dom.count("s ago</td>") > 3


def test_the_stack_starts_shows_degradation_and_stops(tiny_model_path: Path) -> None:
    need("prometheus")
    names = ("grpc", "http", "prometheus", "alertmanager", "receiver")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = [text for name, port in ports.items() for text in (f"--{name}-port", str(port))]
    command = [sys.executable, ROOT / "deploy" / "stack.py", tiny_model_path, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        said = "".join(
            iter(
                process.stdout.readline, "A small load runs: prompts of 50 to 3,500 tokens. Ctrl-C stops everything.\n"
            )
        )
        assert f"http://127.0.0.1:{ports['http']}/" in said
        prometheus = Prometheus(ports["prometheus"])
        wait_until(lambda: len(prometheus.query(stack.DEGRADATION)) > 1, "degradation has two contexts")
        process.send_signal(signal.SIGINT)
        assert process.wait(2 * WAIT) == 0
    finally:
        stack.stop(process)  # politely: it has children
    for port in ports.values():
        with pytest.raises(OSError, match="refused"):
            get_json(f"http://127.0.0.1:{port}/")
