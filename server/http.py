"""The HTTP port: /metrics, /healthz, and the live page at / with its data at /live.json, in threads of their own."""

from __future__ import annotations

import base64
import io
import logging
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import make_wsgi_app

from pagestream.server.collector import make_registry
from pagestream.server.keys import KeyFile
from pagestream.server.live import live_json, live_page
from pagestream.server.metrics import Metrics
from pagestream.server.reload import Reloaded
from pagestream.server.snapshot import ServerState
from pagestream.server.tls import TlsFiles, server_context

log = logging.getLogger(__name__)

_HEAD_SECONDS = 10.0  # a client that sends nothing, or a byte now and then, must not hold a thread for ever
_MAX_HEAD_BYTES = 16 * 2**10
_MAX_CONNECTIONS = 64  # each has a thread
_ONLY_OURSELVES = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)


class HttpServer:
    """A running server; `port` is the one it listens on."""

    def __init__(self, server: WSGIServer) -> None:
        self._server = server
        self.port: int = server.server_port
        self._thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening; answers on their way are not waited for."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def start_http(
    port: int, host: str, metrics: Metrics, tls: TlsFiles | None = None, keys: KeyFile | None = None
) -> HttpServer:
    """Serves until closed; port 0 picks a free one. With `keys`, all but /healthz is for those that may read metrics.

    Raises OSError if the port cannot be had or the TLS files cannot be used.
    """
    server_class = _ServerV6 if ":" in host else _Server
    context = server_context(tls) if tls else None
    try:
        server = make_server(host, port, _guarded(_app(metrics), keys), server_class, _Handler)
    except OSError as error:
        raise OSError(
            f"the HTTP port {port} of {host} cannot be opened ({error.strerror}): choose another --http-port or --host"
        ) from error
    server.context = context
    return HttpServer(server)


def _app(metrics: Metrics) -> WSGIApplication:
    serve_metrics = make_wsgi_app(make_registry(metrics))
    page = live_page()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                answer: Iterable[bytes] = serve_metrics(environ, start_response)
                return answer
            case "/healthz":
                state = metrics.status().state
                if state is ServerState.READY:
                    return _respond(start_response, "200 OK", "ok")
                return _respond(start_response, "503 Service Unavailable", state.value)
            case "/":
                return _respond(start_response, "200 OK", page, "text/html")
            case "/live.json":
                return _respond(start_response, "200 OK", live_json(metrics), "application/json")
            case _:
                return _respond(start_response, "404 Not Found", "not found")

    return app


def _guarded(app: WSGIApplication, keys: KeyFile | None) -> WSGIApplication:
    def guard(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not keys or environ["PATH_INFO"] == "/healthz" or _may_read(environ.get("HTTP_AUTHORIZATION", ""), keys):
            return app(environ, start_response)
        return _respond(start_response, "401 Unauthorized", "the token of a key with metrics = true is needed")

    return guard


def _may_read(authorization: str, keys: KeyFile) -> bool:
    """`Bearer TOKEN`, or the token as the password of any name, which is what browsers ask people for."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            token = base64.b64decode(token, validate=True).decode().partition(":")[2]
        except ValueError:
            return False
    elif scheme.lower() != "bearer":
        return False
    key = keys.find(token.strip())
    return key is not None and key.metrics


def _respond(start_response: StartResponse, status: str, text: str, media_type: str = "text/plain") -> list[bytes]:
    body = text.encode()
    challenge = [("WWW-Authenticate", 'Basic realm="pagestream", charset="UTF-8"')] if status.startswith("401") else []
    start_response(
        status,
        [
            *challenge,
            ("Content-Type", f"{media_type}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", _ONLY_OURSELVES),
        ],
    )
    return [body]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    context: Reloaded[ssl.SSLContext] | None = None  # TLS

    def __init__(self, *settings: Any) -> None:
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(*settings)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread, so that a slow handshake holds up nobody."""
        if self.context is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(_HEAD_SECONDS)  # for the whole handshake
        with self.context.get().wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's signature
        """A client that hangs up or stays silent is no event worth a traceback on stderr."""
        log.debug("a request from %s was cut off: %r", client_address, sys.exc_info()[1])


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    def setup(self) -> None:
        super().setup()
        self.rfile = io.BytesIO(_read_head(self.connection))
        self.connection.settimeout(_HEAD_SECONDS)  # for each piece of the answer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        log.debug(format, *args)


def _read_head(connection: socket.socket) -> bytes:
    """A request up to its empty line: no path here takes a body. Raises OSError if it is too long or slow."""
    head, until = b"", time.monotonic() + _HEAD_SECONDS
    while b"\r\n\r\n" not in head and b"\n\n" not in head:
        connection.settimeout(max(until - time.monotonic(), 0.001))
        received = connection.recv(4096)
        head += received
        if not received or len(head) > _MAX_HEAD_BYTES:
            raise ConnectionError("no whole request came")
    return head
