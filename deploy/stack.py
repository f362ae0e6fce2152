"""`make stack`: a server, Prometheus with our rules, Alertmanager and a small load, without containers, until Ctrl-C.

Prometheus and Alertmanager are those of the system (Debian: prometheus, prometheus-alertmanager); what is missing is
left out, and said. Everything listens on loopback, writes to a temporary folder alone, and is gone at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from pagestream.server.client import CallError, Client
from pagestream.v1.generation_pb2 import GenerateStreamRequest, StopConfig, TokenIds

CONFIG = Path(__file__).parent / "prometheus"
STOP_SECONDS = 40.0  # more than the server's own grace
START_SECONDS = 180.0
DEGRADATION = "model_ctx:pagestream_inter_token_latency_seconds:degradation_factor_10m"
LENGTHS = (50, 200, 400, 900, 1800, 3500)  # prompt tokens of the load, as far as the model goes


class StackError(Exception):
    """It cannot go on; the message says why."""


@dataclass(frozen=True)
class Ports:
    grpc: int = 50051
    http: int = 8080
    prometheus: int = 9090
    alertmanager: int = 9093
    receiver: int = 9095


def write_config(folder: Path, ports: Ports) -> None:
    """The configuration as shipped, with loopback targets and the receiver's port."""
    (folder / "targets").mkdir()
    for name in ("prometheus.yml", "rules.yml", "alerts.yml"):
        shutil.copy(CONFIG / name, folder / name)
    text = (CONFIG / "alertmanager.yml").read_text()
    (folder / "alertmanager.yml").write_text(text.replace(":9095/", f":{ports.receiver}/"))
    for name, port in (("pagestream", ports.http), ("alertmanager", ports.alertmanager)):
        (folder / "targets" / f"{name}.yml").write_text(f'- targets: ["127.0.0.1:{port}"]\n')


def prometheus_command(folder: Path, port: int) -> list[str]:
    return [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]


def alertmanager_command(folder: Path, port: int) -> list[str]:
    return [
        "prometheus-alertmanager",
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",  # no gossip with others
        "--log.level=warn",
    ]


class Receiver:
    """A webhook that hands each alert to `tell`: what Alertmanager's documentation calls an element of `alerts`."""

    def __init__(self, port: int, tell: Callable[[dict[str, Any]], None]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                for alert in json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"]:
                    tell(alert)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port: int = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def stop(process: subprocess.Popen[Any]) -> None:
    """SIGTERM, and SIGKILL for who does not listen."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    process.kill()
    process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - loopback
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise StackError(f"{' '.join(map(str, process.args[:4]))} … did not get ready")  # type: ignore[index]
        time.sleep(0.2)


def load(address: str, ended: threading.Event) -> None:
    """Two clients, each one request after the other, of all lengths that the model takes."""
    with Client(address) as client:
        model = client.model()
        longest = model.max_context_tokens - 100
        draw = random.Random()  # noqa: S311 - no secret
        while not ended.wait(0.2):
            ids = [draw.randrange(model.vocab_size) for _ in range(min(draw.choice(LENGTHS), longest))]
            request = GenerateStreamRequest(
                token_ids=TokenIds(ids=ids), stop=StopConfig(max_tokens=40, ignore_eos=True)
            )
            with suppress(CallError):
                for _ in client.stream(request):
                    if ended.is_set():
                        break


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def show(alert: dict[str, Any]) -> None:
    say(f"ALERT {alert['status']}: {alert['annotations']['summary']}")


def run(model: str, ports: Ports) -> NoReturn:
    """Starts everything, says where it is, and waits; stops it all on its way out. StackError if something ends."""
    ended = threading.Event()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pagestream-stack-")))
        write_config(folder, ports)

        def start(command: list[str], url: str) -> subprocess.Popen[Any]:
            process = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - Ctrl-C is ours to pass on
            stack.callback(stop, process)
            wait_until_ready(url, process)
            return process

        command = [sys.executable, "-m", "pagestream.server", "serve", model, "--grpc-port", str(ports.grpc)]
        command += ["--drain-seconds", "2"]  # nobody but our own load waits for answers
        base = "http://127.0.0.1"
        server = start([*command, "--http-port", str(ports.http)], f"{base}:{ports.http}/healthz")
        say(f"Live page      {base}:{ports.http}/")
        say(f"gRPC           127.0.0.1:{ports.grpc}")
        if shutil.which("prometheus-alertmanager"):
            receiver = Receiver(ports.receiver, show)
            stack.callback(receiver.close)
            url = f"{base}:{ports.alertmanager}"
            start(alertmanager_command(folder, ports.alertmanager), f"{url}/-/ready")
            say(f"Alertmanager   {url}/  (what it sends is printed here)")
        else:
            say("Alertmanager   not installed (Debian: prometheus-alertmanager)")
        if shutil.which("prometheus"):
            url = f"{base}:{ports.prometheus}"
            start(prometheus_command(folder, ports.prometheus), f"{url}/-/ready")
            say(f"Prometheus     {url}/alerts")
            say(f"Degradation    {url}/graph?g0.expr={quote(DEGRADATION)}&g0.tab=0&g0.range_input=10m")
        else:
            say("Prometheus     not installed (Debian: prometheus)")
        for _ in range(2):  # daemons: a long prompt on its way must not hold up the end
            threading.Thread(target=load, args=(f"127.0.0.1:{ports.grpc}", ended), daemon=True).start()
        stack.callback(ended.set)
        say("A small load runs: prompts of 50 to 3,500 tokens. Ctrl-C stops everything.")
        raise StackError(f"the server ended with exit code {server.wait()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="default")
    for name, port in vars(Ports()).items():
        parser.add_argument(f"--{name}-port", dest=name, type=int, default=port, metavar=str(port))
    options = vars(parser.parse_args())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(options.pop("model"), Ports(**options))
    except StackError as error:
        say(f"make stack: {error}")
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
