"""The commands for whoever runs a server: tokens, the admin socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import grpc
import typer
from google.protobuf.json_format import MessageToJson

from pagestream.server.config import load_config
from pagestream.server.keys import LIMITS, new_token, parse_key
from pagestream.v1.admin_pb2 import DrainRequest, GetStateRequest, SetLogLevelRequest
from pagestream.v1.admin_pb2_grpc import AdminServiceStub

_ADMIN_SECONDS = 5.0
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


def token_command(
    name: Annotated[str, typer.Argument(help="For logs; of letters, digits and _.@-")],
    *,
    tenant: Annotated[str | None, typer.Option(help="Shared with other keys.", show_default="one of its own")] = None,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Calls at once.", show_default="any")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt.", show_default="any")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.", show_default="any")] = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="May read the metrics and the live page too.")] = False,
) -> None:
    """Makes a token for a client, and its entry for the file that [bold]serve --keys-file[/] takes.

    The entry goes to stdout, the token itself to stderr. It is kept nowhere.

    Example: [bold]pagestream token search --max-requests 8 >> keys.toml[/]
    """
    token, sha256 = new_token()
    entry: dict[str, str | int | None] = {"name": name, "sha256": sha256, "tenant": tenant}
    entry |= dict(zip(LIMITS, (max_requests, max_prompt_tokens, max_tokens), strict=True))
    entry["metrics"] = metrics or None
    given = {field: value for field, value in entry.items() if value is not None}
    try:
        parse_key(given, "the key")
    except OSError as error:
        typer.echo(f"pagestream: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo("[[key]]")
    for field, value in given.items():
        typer.echo(f"{field} = {json.dumps(value)}")  # of such values also TOML
    typer.echo()
    typer.echo(token, err=True)


def doctor(
    model: Annotated[str | None, typer.Argument(help="As for [bold]serve[/].", show_default="default")] = None,
    *,
    config: Annotated[Path | None, typer.Option(help="The server's TOML file.", show_default="none")] = None,
) -> None:
    """Says whether this machine can serve, and what to do about what is missing.

    It looks at processor, compiler, kernels, GPU, model, memory, ports, certificate and keys.

    Example: [bold]pagestream doctor --config server.toml[/]
    """
    try:
        settings = load_config(config, {} if model is None else {"model": model})
    except ValueError as error:
        typer.echo(f"pagestream: {error}", err=True)
        raise typer.Exit(2) from error
    from pagestream.server.doctor import examine  # noqa: PLC0415 - torch: seconds that --help need not wait

    healthy = True
    for finding in examine(settings):
        healthy = healthy and finding.good
        typer.echo(f"{'✓' if finding.good else '✗'} {finding.what}: {finding.found}")
        if finding.advice:
            typer.echo(f"    → {finding.advice}")
    raise typer.Exit(0 if healthy else 1)


def admin(
    action: Annotated[Literal["state", "drain", "log-level"], typer.Argument(help="What to ask for.")],
    level: Annotated[LogLevel, typer.Argument(help="For [bold]log-level[/].")] = "INFO",
    *,
    socket: Annotated[Path, typer.Option(help="The server's --admin-socket.")],
) -> None:
    """Asks a running server for its state as JSON, has it drain and end, or sets its log level.

    Example: [bold]pagestream admin state --socket /run/pagestream/admin.sock[/]
    """
    with grpc.insecure_channel(f"unix:{socket.absolute()}") as channel:
        stub = AdminServiceStub(channel)
        try:
            if action == "state":
                state = stub.GetState(GetStateRequest(), timeout=_ADMIN_SECONDS)
                typer.echo(
                    MessageToJson(state, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
                )
            elif action == "drain":
                stub.Drain(DrainRequest(), timeout=_ADMIN_SECONDS)
            else:
                stub.SetLogLevel(SetLogLevelRequest(level=level), timeout=_ADMIN_SECONDS)
        except grpc.RpcError as error:
            typer.echo(f"pagestream: no server answers at {socket} ({error.code().name})", err=True)
            raise typer.Exit(4) from error
