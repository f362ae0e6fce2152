"""The certificate that the gRPC port shows, and the authority that its clients' certificates must come from."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from pagestream.server.reload import Reloaded


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. With `client_ca`, clients without a certificate of that authority are refused (mTLS)."""

    cert: Path
    key: Path
    client_ca: Path | None = None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that every new connection finds as the files are then. Raises OSError if they are no usable pair."""
    named = [files.cert, files.key, *([files.client_ca] if files.client_ca else [])]
    configuration = Reloaded(named, lambda: _load(files))
    return grpc.dynamic_ssl_server_credentials(
        configuration.get(), configuration.get, require_client_authentication=files.client_ca is not None
    )


def _load(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    """Tried with Python's own TLS first: gRPC takes any bytes and fails in every later handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    file = files.cert
    try:
        certificate = files.cert.read_bytes()
        file = files.key
        private_key = files.key.read_bytes()
        context.load_cert_chain(files.cert, files.key)
        authority = None
        if files.client_ca:
            file = files.client_ca
            authority = files.client_ca.read_bytes()
            context.load_verify_locations(files.client_ca)
    except ssl.SSLError as error:
        raise OSError(f"{files.cert} and {file} are no usable certificate and key ({error.reason})") from error
    except OSError as error:
        raise OSError(f"{file}: {error.strerror}") from error
    return grpc.ssl_server_certificate_configuration([(private_key, certificate)], authority)
