"""A pagestream server in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.support.client import Client
from tests.support.waiting import WAIT, wait_until

START = 120.0  # seconds to import torch, load and warm up, on a machine that has much else to do


class ServerProcess:
    """`pagestream serve` on free ports, at the exact dtype; everything it says is kept in `log`."""

    def __init__(self, model: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "pagestream.server", "serve", str(model)]
        command += ["--grpc-port", "0", "--http-port", "0", "--dtype", "fp32", "--device", "cpu"]
        command += ["--canary-interval", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.log: list[str] = []
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        address = self.wait_for_log(r"gRPC on (\S+); metrics on https?://(\S+)/metrics", START)
        self.address, self.http_address = address[1], address[2]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._said:
                self.log.append(line)
                self._said.notify_all()
        with self._said:
            self._said.notify_all()

    def wait_for_log(self, pattern: str, seconds: float = WAIT) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            return next((match for line in self.log if (match := re.search(pattern, line))), None)

        with self._said:
            self._said.wait_for(lambda: found() or self.process.poll() is not None, seconds)
            match = found()
        assert match, f"the server did not say {pattern!r}:\n{''.join(self.log)}"
        return match

    def wait_until_ready(self) -> None:
        self.wait_for_log("ready: ", START)

    def connect(self) -> Client:
        return Client(self.address)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait_for_exit(self, seconds: float = WAIT) -> int:
        return self.process.wait(seconds)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT)
        self._reader.join(WAIT)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all series of a metric that have these labels."""
        url = f"http://{self.http_address}/metrics"
        with urllib.request.urlopen(url, timeout=WAIT) as response:
            families = text_string_to_metric_families(response.read().decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == f"pagestream_{name}" and labels.items() <= sample.labels.items()
        )

    def wait_until_idle(self) -> None:
        """No stream is open, nothing runs or waits, and every block is free."""

        def idle() -> bool:
            busy = ("grpc_active_streams", "running_requests", "waiting_requests", "kv_leaked_blocks")
            return not any(map(self.metric, busy)) and self.metric("kv_blocks", state="active") == 0

        wait_until(idle, "the server is idle")
        assert self.metric("kv_blocks", state="active") == 0 < self.metric("kv_blocks")

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    def resources(self) -> tuple[int, int]:
        """How many files and threads it has open."""
        folder = Path("/proc") / str(self.process.pid)
        return len(os.listdir(folder / "fd")), len(os.listdir(folder / "task"))  # noqa: PTH208 - entries vanish
