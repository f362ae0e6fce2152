"""deploy/envoy/envoy.yaml, run by Envoy in front of two servers; only its addresses are changed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from pagestream.v1 import generation_pb2 as pb
from tests.support.client import Client
from tests.support.process import ServerProcess
from tests.support.waiting import WAIT, wait_until

Serve = Callable[..., ServerProcess]
SHIPPED = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"
METHOD = "/pagestream.v1.GenerationService/GenerateStream"
LONG = pb.StopConfig(max_tokens=1500, ignore_eos=True)


@dataclass
class Proxy:
    address: str
    admin: str
    servers: list[ServerProcess]

    def is_ready(self, server: ServerProcess) -> bool:
        """Whether calls go to it, by the flags that Envoy keeps for each replica."""
        with urllib.request.urlopen(f"http://{self.admin}/clusters", timeout=WAIT) as response:
            page = response.read().decode()
        flags = re.search(rf"::{re.escape(server.address)}::health_flags::(\S+)", page)
        return flags is not None and flags[1] == "healthy"

    def wait_until_ready(self) -> None:
        for server in self.servers:
            wait_until(lambda server=server: self.is_ready(server), "both are healthy")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def proxy(
    tool: Callable[[str], str], serve: Serve, tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    envoy = tool("envoy")
    servers = [serve(tiny_model_path, "--threads", "1") for _ in range(2)]
    config: dict[str, Any] = yaml.safe_load(SHIPPED.read_text())
    inside, admin = free_ports(2)
    (listener,) = config["static_resources"]["listeners"]
    (cluster,) = config["static_resources"]["clusters"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": inside}
    config["admin"]["address"]["socket_address"]["port_value"] = admin
    endpoints = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    for endpoint, server in zip(endpoints, servers, strict=True):
        endpoint["endpoint"]["address"]["socket_address"]["port_value"] = int(server.address.rpartition(":")[2])
    file = tmp_path_factory.mktemp("envoy") / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [envoy, "-c", file, "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]
    with subprocess.Popen(command) as process:
        try:
            proxy = Proxy(f"127.0.0.1:{inside}", f"127.0.0.1:{admin}", servers)
            wait_until(lambda: is_open(admin), "Envoy answers")
            proxy.wait_until_ready()
            yield proxy
        finally:
            process.terminate()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def client(proxy: Proxy) -> Iterator[Client]:
    proxy.wait_until_ready()
    client = Client(proxy.address)
    yield client
    client.close()


def started(proxy: Proxy) -> list[float]:
    return [server.metric("grpc_server_started_total", method=METHOD) for server in proxy.servers]


def test_the_shipped_file_is_valid(tool: Callable[[str], str]) -> None:
    subprocess.run([tool("envoy"), "--mode", "validate", "-c", SHIPPED], check=True, capture_output=True)


def test_streams_are_spread(proxy: Proxy, client: Client) -> None:
    before = started(proxy)
    calls = [client.open(text="x", stop=LONG) for _ in range(12)]
    for call in calls:
        next(call)
    share = [now - then for now, then in zip(started(proxy), before, strict=True)]
    for call in calls:
        call.cancel()
    assert sum(share) == 12
    assert min(share) >= 3
    for server in proxy.servers:  # a cancelled call is cancelled at its server
        server.wait_until_idle()


def test_a_stream_is_not_held_back(proxy: Proxy, client: Client) -> None:
    call = client.open(text="x", stop=LONG)
    while not next(call).HasField("delta"):
        pass
    first = time.monotonic()
    timings = list(call)[-1].finished.timings
    assert time.monotonic() - first > timings.decode.ToTimedelta().total_seconds() / 2  # as long as it took to make


def test_a_frozen_replica_gets_no_calls_until_it_is_back(proxy: Proxy, client: Client) -> None:
    frozen, other = proxy.servers
    os.kill(frozen.process.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: not proxy.is_ready(frozen), "Envoy sees that it is frozen")
        before = other.metric("grpc_server_started_total", method=METHOD)
        for _ in range(6):
            client.stream(text="x", stop=pb.StopConfig(max_tokens=2))
        assert other.metric("grpc_server_started_total", method=METHOD) == before + 6
    finally:
        os.kill(frozen.process.pid, signal.SIGCONT)
    wait_until(lambda: proxy.is_ready(frozen), "it is back")


@dataclass
class Load:
    answered: int = 0
    failed: list[str] = field(default_factory=list)


@contextmanager
def load_on(address: str) -> Iterator[Load]:
    """Three clients that call one after another until the block is left."""
    load, enough = Load(), threading.Event()

    def call() -> None:
        client = Client(address)
        while not enough.is_set():
            try:
                client.stream(text="x", stop=pb.StopConfig(max_tokens=20, ignore_eos=True))
                load.answered += 1
            except (grpc.RpcError, AssertionError) as error:
                load.failed.append(str(error))
        client.close()

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        enough.set()
        for thread in threads:
            thread.join(WAIT)


@pytest.mark.slow
def test_a_rolling_restart_under_load_loses_nothing(
    proxy: Proxy,
    client: Client,
    serve: Serve,
    tiny_model_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    with load_on(proxy.address) as load:
        for index, old in enumerate(proxy.servers):
            some = pb.StopConfig(max_tokens=500, ignore_eos=True)  # more than a step or two, less than the grace
            long = [client.open(text="x", stop=some) for _ in range(4)]
            for call in long:
                next(call)
            before = load.answered
            old.terminate()
            for call in long:  # within the grace
                assert list(call)[-1].finished.usage.output_tokens == 500
            assert old.wait_for_exit() == 0
            port = old.address.rpartition(":")[2]
            proxy.servers[index] = serve(tiny_model_path, "--threads", "1", "--grpc-port", port)
            proxy.wait_until_ready()
            wait_until(lambda before=before: load.answered > before + 5, "calls go on")
    record_property("calls answered while both servers restarted", load.answered)
    assert load.failed == []
