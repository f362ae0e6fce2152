"""What every result carries: when, which commit, which machine, which versions, and the machine's read bandwidth."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "numpy")


def environment() -> dict[str, Any]:
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _commit() -> str:
    """Empty outside a checkout, and on a machine without git."""
    if (git := shutil.which("git")) is None:
        return ""
    command = [git, "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603 - the user's own git


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def read_bandwidth(megabytes: int = 512, rounds: int = 7) -> float:
    """Bytes per second that all threads together read from memory: the median of sums over a tensor too large for the
    caches."""
    data = torch.ones(megabytes * 2**20 // 4)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - started)
    return data.nbytes / statistics.median(seconds)


def seconds_of_others() -> float:
    """Processor time of all that runs on this machine beside this process and its children, in seconds since some
    moment: what they took meanwhile tells whether a measurement was alone."""
    busy = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    children = [pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]
    own = 0
    for pid in ("self", *children):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        own += int(fields[11]) + int(fields[12])
    idle = busy[3] + busy[4]  # and waiting for a disk
    return (sum(busy) - idle - own) / os.sysconf("SC_CLK_TCK")


def save(name: str, result: dict[str, Any], folder: Path) -> Path:
    """Writes one result and prints it as the last line of the output."""
    document = {"benchmark": name, **environment(), **result}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{document['date'][:10]}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))  # noqa: T201 - a benchmark's output
    return path
