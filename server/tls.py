"""The certificate that both ports show, and the authority that their clients' certificates must come from."""

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

    @property
    def named(self) -> list[Path]:
        return [self.cert, self.key, *([self.client_ca] if self.client_ca else [])]


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that every new connection finds as the files are then. Raises OSError if they are no usable pair."""
    configuration = Reloaded(files.named, lambda: _configuration(files))
    return grpc.dynamic_ssl_server_credentials(
        configuration.get(), configuration.get, require_client_authentication=files.client_ca is not None
    )


def server_context(files: TlsFiles) -> Reloaded[ssl.SSLContext]:
    """The same for Python's own TLS."""
    return Reloaded(files.named, lambda: _context(files))


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    """Tried with Python's own TLS first: gRPC takes any bytes and fails in every later handshake."""
    _context(files)
    authority = files.client_ca.read_bytes() if files.client_ca else None
    return grpc.ssl_server_certificate_configuration([(files.key.read_bytes(), files.cert.read_bytes())], authority)


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    file = files.cert
    try:
        for file in files.named:
            file.read_bytes()  # an error of the next call would not say which
        context.load_cert_chain(files.cert, files.key)
        if files.client_ca:
            context.load_verify_locations(files.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        others = " and ".join(map(str, files.named[1:]))
        raise OSError(f"{files.cert} and {others} are no usable certificate and key ({error.reason})") from error
    except OSError as error:
        raise OSError(f"{file}: {error.strerror}") from error
    return context
