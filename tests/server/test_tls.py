"""TLS on the gRPC port: who is let in, and that certificates are rotated without a restart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from pagestream.server import __main__ as cli
from pagestream.server.client import Client, Credentials, UnreachableError
from pagestream.server.tls import TlsFiles, server_credentials
from tests.support.certificates import Pair, make_pair
from tests.support.service import Service

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
