"""Traffic for a server that is watched, and the questions one asks a Prometheus."""

from __future__ import annotations

import json
import math
import random
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc

from pagestream.v1 import generation_pb2 as pb
from tests.support.client import Client
from tests.support.waiting import WAIT

LENGTHS = (20, 300, 700, 1500, 3000)  # prompt characters, and about as many tokens of the tiny model


@contextmanager
def traffic(address: str, clients: int) -> Iterator[None]:
    """So many clients, each with one request after the other, of all lengths; one in eight leaves early."""
    ended = threading.Event()

    def ask(seed: int) -> None:
        draw, client = random.Random(seed), Client(address)
        while not ended.is_set():
            text = "".join(draw.choices("abcdefgh ", k=draw.choice(LENGTHS)))
            stop = pb.StopConfig(max_tokens=draw.choice((20, 200)), ignore_eos=True)
            call = client.open(text=text, stop=stop)
            with suppress(grpc.RpcError):
                for count, _ in enumerate(call):
                    if count > 2 and (ended.is_set() or not draw.randrange(8)):
                        break
            call.cancel()
            if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                ended.wait(0.1)  # as polite as a client should be
        client.close()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(WAIT)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=WAIT) as response:  # noqa: S310 - loopback
        return json.load(response)


class Prometheus:
    """The HTTP API of one that runs."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def query(self, expression: str) -> list[float]:
        """The values of an instant vector that are numbers."""
        query = urllib.parse.urlencode({"query": expression})
        answer = get_json(f"{self.url}/api/v1/query?{query}")
        values = [float(series["value"][1]) for series in answer["data"]["result"]]
        return [value for value in values if not math.isnan(value)]

    def rules(self) -> list[dict[str, Any]]:
        groups = get_json(f"{self.url}/api/v1/rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]
