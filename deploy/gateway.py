"""`make gateway`: two servers and the Shepherd Model Gateway in front of them, with the OpenAI API, until Ctrl-C.

smg is that of build/tools or of the PATH. Everything listens on loopback and is gone at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

from stack import START_SECONDS, StackError, say, stop, wait_until_ready

TOOLS = Path(__file__).parents[1] / "build" / "tools" / "bin"
MISSING_SMG = "smg is missing: python3 -m venv build/tools && build/tools/bin/pip install smg==1.13.0"
MISSING_EXTRA = "the extra is missing: .venv/bin/pip install --editable '.[gateway]'"


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        return [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def smg_command(smg: str, port: int, metrics_port: int, workers: Sequence[str]) -> list[str]:
    """`workers` are host:port of servers that are ready: smg asks each for its model once, when it starts."""
    return [
        *(smg, "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port), "--log-level", "warn"),
        *("--policy", "cache_aware"),
        *("--worker-urls", *(f"grpc://{worker}" for worker in workers)),
    ]


def models(url: str) -> list[str]:
    """What smg knows of its workers' models, "unknown" among it for one that it could not ask."""
    with urllib.request.urlopen(f"{url}/workers", timeout=5) as response:  # noqa: S310 - loopback
        return [worker["model_id"] for worker in json.load(response)["workers"]]


def wait_for_workers(url: str, process: subprocess.Popen[Any], count: int) -> str:
    """The model's name, once smg has asked all workers."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            known = models(url)
            if len(known) == count and "unknown" not in known:
                return known[0]
        time.sleep(0.2)
    raise StackError("smg does not know its workers")


def run(model: str, smg: str, port: int, replicas: int) -> NoReturn:
    with ExitStack() as stack:

        def start(command: list[str]) -> subprocess.Popen[Any]:
            process = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - Ctrl-C is ours to pass on
            stack.callback(stop, process)
            return process

        metrics_port, *ports = free_ports(1 + 2 * replicas)
        workers = [f"127.0.0.1:{grpc}" for grpc in ports[:replicas]]
        servers = []
        for grpc, http in zip(ports[:replicas], ports[replicas:], strict=True):
            command = [sys.executable, "-m", "pagestream.server", "serve", model]
            servers.append((start([*command, "--grpc-port", str(grpc), "--http-port", str(http)]), http))
        for server, http in servers:
            wait_until_ready(f"http://127.0.0.1:{http}/healthz", server)
        url = f"http://127.0.0.1:{port}"
        gateway = start(smg_command(smg, port, metrics_port, workers))
        name = wait_for_workers(url, gateway, replicas)
        chat = {"model": name, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 20}
        say(f"OpenAI API     {url}/v1  (model {name}, workers {', '.join(workers)})")
        for _, http in servers:
            say(f"Live page      http://127.0.0.1:{http}/")
        say(
            f"Try            curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(chat)}'"
        )
        say("Ctrl-C stops everything.")
        raise StackError(f"smg ended with exit code {gateway.wait()}")


def find_smg() -> str:
    """Raises StackError, which says how to install what is missing."""
    if importlib.util.find_spec("smg_grpc_proto") is None:
        raise StackError(MISSING_EXTRA)
    smg = shutil.which(TOOLS / "smg") or shutil.which("smg")
    if smg is None:
        raise StackError(MISSING_SMG)
    return smg


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--port", type=int, default=30000, help="of the OpenAI API")
    parser.add_argument("--replicas", type=int, default=2)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(options.model, find_smg(), options.port, options.replicas)
    except StackError as error:
        say(f"make gateway: {error}")
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
