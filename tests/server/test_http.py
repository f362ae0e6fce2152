"""The HTTP port over loopback."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import re
import socket
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from pagestream.server import http
from pagestream.server.http import HttpServer, start_http
from pagestream.server.keys import KeyFile
from pagestream.server.metrics import Metrics
from pagestream.server.snapshot import ServerState
from tests.support.waiting import WAIT, wait_until


@pytest.fixture
def metrics(make_metrics: Callable[..., Metrics]) -> Metrics:
    return make_metrics()


@pytest.fixture
def server(metrics: Metrics) -> Iterator[HttpServer]:
    server = start_http(0, "127.0.0.1", metrics)
    yield server
    server.close()


def get(server: HttpServer, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    request = Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urlopen(request, timeout=WAIT) as response:  # noqa: S310 - loopback
            return response.status, response.read(), dict(response.headers)
    except HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def test_metrics_are_the_text_format_by_default(server: HttpServer, metrics: Metrics) -> None:
    metrics.observe_gaps([100], [0.01])
    status, body, headers = get(server, "/metrics")
    names = {family.name for family in parse_text(body.decode())}
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert {"pagestream_inter_token_latency_seconds", "process_resident_memory_bytes"} <= names


def test_metrics_are_negotiated(server: HttpServer) -> None:
    accept = "application/openmetrics-text;version=1.0.0"
    _, body, headers = get(server, "/metrics", Accept=accept, **{"Accept-Encoding": "gzip"})
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert any(family.name == "pagestream_ready" for family in parse_openmetrics(gzip.decompress(body).decode()))


def test_metrics_can_be_chosen_by_name(server: HttpServer) -> None:
    _, body, _ = get(server, "/metrics?name[]=pagestream_kv_blocks")
    assert [family.name for family in parse_text(body.decode())] == ["pagestream_kv_blocks"]


@pytest.mark.parametrize(
    ("state", "status", "text"),
    [
        (ServerState.LOADING, 503, b"loading"),
        (ServerState.READY, 200, b"ok"),
        (ServerState.DRAINING, 503, b"draining"),
        (ServerState.FAILED, 503, b"failed"),
    ],
)
def test_health_follows_the_state(
    server: HttpServer, metrics: Metrics, state: ServerState, status: int, text: bytes
) -> None:
    metrics.state = state
    assert get(server, "/healthz")[:2] == (status, text)


def test_the_live_page_is_one_document_that_needs_no_other_address(server: HttpServer) -> None:
    status, body, headers = get(server, "/")
    page = body.decode()
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'; connect-src 'self'" in headers["Content-Security-Policy"]  # a browser holds it to that
    for part in ("<title>pagestream</title>", 'href="/metrics"', "uPlot", "<noscript>"):
        assert part in page
    assert not re.search(r"<(script|img|iframe)[^>]+src=|@import|url\(http", page)


def test_live_json_is_never_cached(server: HttpServer, metrics: Metrics) -> None:
    metrics.state = ServerState.READY
    status, body, headers = get(server, "/live.json")
    assert (status, json.loads(body)["state"]) == (200, "ready")
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"


def test_other_paths_are_not_found(server: HttpServer) -> None:
    assert get(server, "/metrics/x")[0] == 404
    assert get(server, "/favicon.ico")[0] == 404


@pytest.fixture
def locked(metrics: Metrics, tmp_path: Path) -> Iterator[HttpServer]:
    file = tmp_path / "keys.toml"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("watcher", "client")}
    file.write_text(
        f'[[key]]\nname = "w"\nsha256 = "{digests["watcher"]}"\nmetrics = true\n'
        f'[[key]]\nname = "c"\nsha256 = "{digests["client"]}"\n'
    )
    server = start_http(0, "127.0.0.1", metrics, keys=KeyFile(file))
    yield server
    server.close()


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


@pytest.mark.parametrize("path", ["/", "/metrics", "/live.json"])
def test_with_keys_only_who_may_read_metrics_does(locked: HttpServer, path: str) -> None:
    """A client's own token does not do: what is told here is of all tenants."""
    for good in ("Bearer watcher", "bearer watcher", basic("watcher")):
        assert get(locked, path, Authorization=good)[0] == 200
    bad = (
        "Bearer client",
        "Bearer other",
        "Bearer ",
        "watcher",
        basic("client"),
        "Basic watcher",
        "Basic /w==",
        "Basic",
    )
    for refused in (*bad, None):
        headers = {} if refused is None else {"Authorization": refused}
        status, body, answer = get(locked, path, **headers)
        assert (status, body) == (401, b"the token of a key with metrics = true is needed"), refused
        assert answer["WWW-Authenticate"].startswith("Basic ")  # a browser asks for it


def test_with_keys_a_probe_needs_none(locked: HttpServer) -> None:
    assert get(locked, "/healthz")[:2] == (503, b"loading")


def test_a_silent_client_holds_up_nobody(server: HttpServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.sendall(b"GET /healthz")
        assert get(server, "/healthz")[0] == 503


class _Drip:
    """A connection that sends a byte each second of its own clock, and times out as sockets do."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timeout = 0.0

    def settimeout(self, seconds: float) -> None:
        self._timeout = seconds

    def recv(self, _size: int) -> bytes:
        self.now += min(self._timeout, 1.0)
        if self._timeout < 1.0:
            raise TimeoutError
        return b"G"


def test_a_request_has_a_time_for_its_whole_head_not_for_each_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    drip = _Drip()
    monkeypatch.setattr(http.time, "monotonic", lambda: drip.now)
    with pytest.raises(TimeoutError):
        http._read_head(drip)  # type: ignore[arg-type]  # all that is used of a socket
    assert drip.now <= 11


def test_an_endless_head_is_cut_off(server: HttpServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as endless:
        endless.sendall(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 4000)
        with contextlib.suppress(ConnectionResetError):
            assert endless.recv(1) == b""


def test_no_more_connections_than_there_are_places(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next is closed at once, and there is room again when one leaves."""
    monkeypatch.setattr(http, "_MAX_CONNECTIONS", 3)
    server = start_http(0, "127.0.0.1", metrics)
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) for _ in range(3)]
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as late:
        assert late.recv(1) == b""
    for connection in held:
        connection.close()

    def answers() -> bool:
        with contextlib.suppress(OSError, HTTPException):
            return get(server, "/healthz")[0] == 503
        return False

    wait_until(answers, "there is room again")
    server.close()


def test_nothing_is_printed(server: HttpServer, capfd: pytest.CaptureFixture[str]) -> None:
    get(server, "/healthz")
    get(server, "/nowhere")
    with socket.create_connection(("127.0.0.1", server.port)) as rude:
        rude.sendall(b"nonsense\r\n\r\n")
        assert b"400" in rude.recv(1000)
    assert capfd.readouterr() == ("", "")


def test_a_taken_port_is_an_error_and_close_frees_it(metrics: Metrics) -> None:
    server = start_http(0, "127.0.0.1", metrics)
    with pytest.raises(OSError, match=f"HTTP port {server.port} .*in use.*--http-port"):
        start_http(server.port, "127.0.0.1", metrics)
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


def test_ipv6(metrics: Metrics) -> None:
    try:
        server = start_http(0, "::1", metrics)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    try:
        with socket.create_connection(("::1", server.port), timeout=WAIT) as client:
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert b"503" in client.recv(1000)
    finally:
        server.close()
