"""How a client proves itself to a server and knows it by, over gRPC and HTTP."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class Credentials:
    """PEM files and a token. Without `ca`, gRPC is plain text and https trusts whom the system trusts."""

    ca: str | None = None  # of the server's certificate
    cert: str | None = None  # the client's own, with its key
    key: str | None = None
    token: str | None = None

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Sent with every call, as metadata of gRPC too."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def for_grpc(self) -> grpc.ChannelCredentials | None:
        """None for plain text. Raises OSError for a file that cannot be read."""
        if self.ca is None:
            return None
        own = [Path(file).read_bytes() if file else None for file in (self.key, self.cert)]
        return grpc.ssl_channel_credentials(Path(self.ca).read_bytes(), *own)

    def for_https(self) -> ssl.SSLContext:
        """Raises OSError for files that cannot be used."""
        context = ssl.create_default_context(cafile=self.ca)
        if self.cert:
            context.load_cert_chain(self.cert, self.key)
        return context


ANONYMOUS = Credentials()
