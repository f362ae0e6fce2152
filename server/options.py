"""Options and arguments that the client commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

Address = Annotated[str, typer.Option(help="HOST:PORT of the server.")]
TlsCa = Annotated[Path | None, typer.Option(help="PEM of the server's authority.", show_default="no TLS")]
TlsCert = Annotated[Path | None, typer.Option(help="PEM of the client's own certificate.", show_default="none")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM of its private key.", show_default="none")]
Token = Annotated[str | None, typer.Option(help="Of the server's key file.", envvar="PAGESTREAM_TOKEN")]


def read_prompt(text: str) -> str:
    """What was typed, or for `-` what standard input holds. Bytes that are not UTF-8 become U+FFFD."""
    data = sys.stdin.buffer.read() if text == "-" else text.encode(errors="surrogateescape")
    return data.decode(errors="replace")
