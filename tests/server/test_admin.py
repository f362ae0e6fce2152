"""The admin socket: what it tells, what it does, and whose it is."""

from __future__ import annotations

import json
import logging
import socket as sockets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pagestream.server import __main__ as cli
from pagestream.server.admin import AdminListener, AdminService
from pagestream.server.snapshot import ServerState
from tests.support.service import Service, stop
from tests.support.waiting import WAIT


@pytest.fixture
def drained() -> threading.Event:
    return threading.Event()


@pytest.fixture
def socket(service: Service, drained: threading.Event, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "admin.sock"

    async def listen() -> AdminListener:
        listener = AdminListener(path, AdminService(service.metrics, service.streams, drained.set))
        await listener.start()
        return listener

    listener = service.run(listen())
    yield path
    service.run(listener.stop())
    assert not path.exists()


def ask(socket: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["admin", *arguments, "--socket", str(socket)])


def test_it_tells_who_is_served_and_nothing_of_what_they_say(service: Service, socket: Path) -> None:
    service.metrics.state = ServerState.READY
    service.rig.runner.hold()
    call = service.client.open(tenant="somebody", text="secret", request_id="id", stop=stop(3))
    next(call)
    service.rig.runner.wait_until_held()
    answer = ask(socket, "state")
    state = json.loads(answer.stdout)
    assert (state["state"], state["model"]) == ("ready", "m")
    [request] = state["requests"]
    assert (request["request_id"], request["prompt_tokens"], request["output_tokens"]) == ("id", 6, 0)
    assert request["tenant"] not in ("", "somebody")
    assert "secret" not in answer.stdout
    service.rig.runner.allow()
    list(call)


def test_it_drains_and_sets_the_log_level(socket: Path, drained: threading.Event) -> None:
    assert ask(socket, "drain").exit_code == 0
    assert drained.is_set()
    before = logging.getLogger().level
    try:
        assert ask(socket, "log-level", "ERROR").exit_code == 0
        assert logging.getLogger().level == logging.ERROR
    finally:
        logging.getLogger().setLevel(before)


def test_only_the_servers_own_user_can_open_it(socket: Path) -> None:
    assert socket.stat().st_mode & 0o777 == 0o600


def test_the_admin_service_is_on_no_network(service: Service, socket: Path) -> None:
    method = service.client.channel.unary_unary("/pagestream.v1.AdminService/Drain")
    with pytest.raises(Exception, match="UNIMPLEMENTED"):
        method(b"", timeout=WAIT)


def test_a_dead_servers_socket_is_taken_over_and_a_live_ones_is_not(
    service: Service, socket: Path, tmp_path: Path, drained: threading.Event
) -> None:
    admin = AdminService(service.metrics, service.streams, drained.set)

    async def listen(path: Path) -> AdminListener:
        return AdminListener(path, admin)

    with pytest.raises(OSError, match="belongs to a server that runs"):
        service.run(listen(socket))

    with sockets.socket(sockets.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    listener = service.run(listen(tmp_path / "dead.sock"))
    service.run(listener.stop())


def test_no_server_is_one_sentence(tmp_path: Path) -> None:
    result = ask(tmp_path / "absent.sock", "state")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr.count("\n") == 1
