"""TLS on both ports: who is let in, and that certificates are rotated without a restart."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from http.client import HTTPSConnection
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from pagestream.server import __main__ as cli
from pagestream.server.client import Client, Credentials, UnreachableError
from pagestream.server.http import HttpServer, start_http
from pagestream.server.metrics import Metrics
from pagestream.server.tls import TlsFiles, server_credentials
from tests.support.certificates import Pair, make_pair
from tests.support.service import Service
from tests.support.waiting import WAIT

MakeService = Callable[..., Service]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Two authorities, and of each a certificate for localhost."""
    folder = tmp_path_factory.mktemp("certificates")
    authorities = {name: make_pair(folder, name) for name in ("ours", "theirs")}
    return authorities | {f"of {name}": make_pair(folder, f"of-{name}", pair) for name, pair in authorities.items()}


def ask(service: Service, credentials: Credentials) -> str:
    """The served model's name. Raises UnreachableError where a connection cannot be had."""
    with Client(f"localhost:{service.listener.port}", credentials) as client:
        return client.model().name


@pytest.mark.filterwarnings("ignore")
def test_only_who_trusts_the_certificate_and_speaks_tls_gets_through(
    make_service: MakeService, pairs: dict[str, Pair]
) -> None:
    service = make_service(listening={"tls": TlsFiles(pairs["of ours"].cert, pairs["of ours"].key)})
    assert ask(service, Credentials(ca=pairs["ours"].cert)) == "models/echo"
    for credentials in (Credentials(), Credentials(ca=pairs["theirs"].cert)):
        with pytest.raises(UnreachableError):
            ask(service, credentials)


def test_with_a_client_authority_only_its_certificates_get_through(
    make_service: MakeService, pairs: dict[str, Pair]
) -> None:
    own, foreign = pairs["of ours"], pairs["of theirs"]
    service = make_service(listening={"tls": TlsFiles(own.cert, own.key, client_ca=pairs["theirs"].cert)})
    assert ask(service, Credentials(pairs["ours"].cert, foreign.cert, foreign.key)) == "models/echo"
    for credentials in (Credentials(pairs["ours"].cert), Credentials(pairs["ours"].cert, own.cert, own.key)):
        with pytest.raises(UnreachableError):
            ask(service, credentials)


def test_a_new_certificate_is_used_without_a_restart_and_half_of_one_is_not(
    make_service: MakeService, pairs: dict[str, Pair], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = Pair(tmp_path / "tls.pem", tmp_path / "tls.key")
    pairs["of ours"].copy_over(live)
    service = make_service(listening={"tls": TlsFiles(live.cert, live.key)})
    old = grpc.secure_channel(
        f"localhost:{service.listener.port}", grpc.ssl_channel_credentials(pairs["ours"].cert.read_bytes())
    )
    grpc.channel_ready_future(old).result(20)
    live.cert.write_bytes(pairs["of theirs"].cert.read_bytes())  # the key is still the old one's
    with caplog.at_level(logging.WARNING):
        assert ask(service, Credentials(ca=pairs["ours"].cert)) == "models/echo"
    assert "what was loaded before stays in use" in caplog.text
    pairs["of theirs"].copy_over(live)
    assert ask(service, Credentials(ca=pairs["theirs"].cert)) == "models/echo"
    with pytest.raises(UnreachableError):
        ask(service, Credentials(ca=pairs["ours"].cert))
    old.close()


def test_files_that_are_no_pair_are_refused_at_the_start(pairs: dict[str, Pair], tmp_path: Path) -> None:
    cert, key = pairs["of ours"].cert, pairs["of theirs"].key
    with pytest.raises(OSError, match="no usable certificate and key"):
        server_credentials(TlsFiles(cert, key))
    with pytest.raises(OSError, match=r"absent: No such file"):
        server_credentials(TlsFiles(tmp_path / "absent", key))
    with pytest.raises(OSError, match="no usable certificate and key"):
        server_credentials(TlsFiles(cert, pairs["of ours"].key, client_ca=key))


def test_the_command_line_speaks_tls(make_service: MakeService, pairs: dict[str, Pair]) -> None:
    own = pairs["of ours"]
    service = make_service(listening={"tls": TlsFiles(own.cert, own.key, client_ca=pairs["theirs"].cert)})
    command = ["generate", "hello", "--raw", "--max-tokens", "5", "--address", f"localhost:{service.listener.port}"]
    command += ["--tls-ca", str(pairs["ours"].cert)]
    with_own = [*command, "--tls-cert", str(pairs["of theirs"].cert), "--tls-key", str(pairs["of theirs"].key)]
    assert CliRunner().invoke(cli.app, with_own).stdout == "hello\n"
    assert CliRunner().invoke(cli.app, command).exit_code == cli.UNREACHABLE
    assert CliRunner().invoke(cli.app, [*command[:-1], "/nowhere"]).exit_code == cli.FAILED


def browse(server: HttpServer, authority: Pair, own: Pair | None = None) -> int:
    """The status of the live page. Raises OSError (ssl.SSLError among it) where no connection can be had."""
    context = ssl.create_default_context(cafile=authority.cert)
    if own:
        context.load_cert_chain(own.cert, own.key)
    page = HTTPSConnection("localhost", server.port, timeout=WAIT, context=context)
    try:
        page.request("GET", "/")
        response = page.getresponse()
        return response.status if response.read().endswith(b"</html>\n") else 0
    finally:
        page.close()


def test_the_http_port_has_the_same_certificate_and_rotates_it(
    make_metrics: Callable[..., Metrics], pairs: dict[str, Pair], tmp_path: Path
) -> None:
    live = Pair(tmp_path / "tls.pem", tmp_path / "tls.key")
    pairs["of ours"].copy_over(live)
    server = start_http(0, "127.0.0.1", make_metrics(), TlsFiles(live.cert, live.key))
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as plain:
        assert browse(server, pairs["ours"]) == 200  # beside one that never begins its handshake
        plain.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(1000)
    with pytest.raises(ssl.SSLCertVerificationError):
        browse(server, pairs["theirs"])
    pairs["of theirs"].copy_over(live)
    assert browse(server, pairs["theirs"]) == 200
    server.close()


def test_the_http_port_asks_for_the_same_client_certificates(
    make_metrics: Callable[..., Metrics], pairs: dict[str, Pair]
) -> None:
    own = pairs["of ours"]
    server = start_http(0, "127.0.0.1", make_metrics(), TlsFiles(own.cert, own.key, client_ca=pairs["theirs"].cert))
    assert browse(server, pairs["ours"], pairs["of theirs"]) == 200
    for certificate in (None, own):
        with pytest.raises(OSError, match=r"alert|reset|EOF|Broken pipe"):
            browse(server, pairs["ours"], certificate)
    server.close()
