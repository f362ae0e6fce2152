"""`pagestream health` against a real gRPC server and against nobody."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from pagestream.server import __main__ as cli


@pytest.fixture
def address() -> Iterator[str]:
    states = health.HealthServicer()
    states.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    states.set("liveness", health_pb2.HealthCheckResponse.SERVING)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("service", "code", "said"), [("liveness", 0, "SERVING\n"), ("", 1, "NOT_SERVING\n"), ("other", 1, "")]
)
def test_the_exit_code_is_the_answer(address: str, service: str, code: int, said: str) -> None:
    result = CliRunner().invoke(cli.app, ["health", "--address", address, "--service", service])
    assert (result.exit_code, result.stdout) == (code, said)


def test_nobody_answers(address: str) -> None:
    nobody = address.replace("127.0.0.1", "127.0.0.9")
    result = CliRunner().invoke(cli.app, ["health", "--address", nobody, "--timeout", "1"])
    assert (result.exit_code, result.stderr) == (4, f"no answer from {nobody}\n")
