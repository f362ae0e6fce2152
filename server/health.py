"""`pagestream health`: what the health check of a container runs. A client, like `generate`."""

from __future__ import annotations

from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pagestream.server.client import Credentials
from pagestream.server.options import Address, TlsCa, TlsCert, TlsKey

NOT_SERVING, UNREACHABLE = 1, 4  # exit codes; 0 is serving


def health(
    address: Address = "localhost:50051",
    service: Annotated[str, typer.Option(help='"liveness", or a service by its full name.', show_default="all")] = "",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 3.0,
) -> None:
    """Asks a server whether it takes requests, by grpc.health.v1.

    Example: [bold]pagestream health --service liveness[/]
    """
    with Credentials(tls_ca, tls_cert, tls_key).open(address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout).status
        except grpc.RpcError as error:
            known = error.code() is grpc.StatusCode.NOT_FOUND
            typer.echo(f"no service {service!r} at {address}" if known else f"no answer from {address}", err=True)
            raise typer.Exit(NOT_SERVING if known else UNREACHABLE) from error
    typer.echo(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
    if status != health_pb2.HealthCheckResponse.SERVING:
        raise typer.Exit(NOT_SERVING)
