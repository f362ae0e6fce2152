"""Options that the client commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Address = Annotated[str, typer.Option(help="HOST:PORT of the server.")]
TlsCa = Annotated[Path | None, typer.Option(help="PEM of the server's authority.", show_default="no TLS")]
TlsCert = Annotated[Path | None, typer.Option(help="PEM of the client's own certificate.", show_default="none")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM of its private key.", show_default="none")]
Token = Annotated[str | None, typer.Option(help="Of the server's key file.", envvar="PAGESTREAM_TOKEN")]
