"""Everything that needs a GPU, in one command: `make gpu-check`, or `python benchmarks/gpu_check.py FOLDER`.

Runs on the python3 it is started with and needs no installation: PYTHONPATH=build/tree holds the package. Writes
`gpu-check.log` (all output) and `gpu-check.json` (device, versions, each step's exit code and seconds) into FOLDER, and
exits with 1 if a step failed. On a machine without a GPU, or whose python3 has no torch, it says so and exits with 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"{sys.executable} has no torch; name one that has: make gpu-check PYTHON=...")
from record import environment

PYTHON = (sys.executable,)
PYTEST = (*PYTHON, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
SHORT = ("tests/kernels/test_cuda_device.py", "-k", "window or float8 or padded")
# Programs, arguments, and seconds after which a step is given up: 9 minutes in all.
STEPS: dict[str, tuple[tuple[str, ...], int]] = {
    "build": ((*PYTHON, "-m", "pagestream.kernels.build", "--cuda"), 130),
    "operators": ((*PYTEST, "tests/kernels"), 100),
    "memcheck": (("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *PYTEST, *SHORT), 60),
    "racecheck": (("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *PYTEST, *SHORT), 60),
    "benchmark": ((*PYTHON, "-m", "pagestream.kernels.bench_cuda"), 160),
    "model": ((*PYTEST, "tests/model"), 30),
}


def run(arguments: tuple[str, ...], limit_s: int, log: IO[str]) -> dict[str, float]:
    """Exit code (-9: given up, 127: no such program) and seconds of one step."""
    started = time.monotonic()
    try:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603 - our own steps
    except FileNotFoundError as error:
        log.write(f"{error}\n")
        return {"exit_code": 127, "seconds": 0}
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    for line in process.stdout or ():
        sys.stdout.write(line)
        log.write(line)
    exit_code = process.wait()
    timer.cancel()
    return {"exit_code": exit_code, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)  # noqa: T201 - a command's own output
        return 2
    if not torch.cuda.is_available():
        print("no CUDA device here; kernels/README.md lists what waits for one", file=sys.stderr)  # noqa: T201
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gpu-check.log").open("w") as log:
        steps: dict[str, dict[str, float]] = {}
        result = {"benchmark": "gpu-check", "device": torch.cuda.get_device_name(), **environment(), "steps": steps}
        for name, (arguments, limit_s) in STEPS.items():
            steps[name] = run(arguments, limit_s, log)
            (folder / "gpu-check.json").write_text(json.dumps(result, indent=1) + "\n")  # even if the next step hangs
    return int(any(step["exit_code"] for step in steps.values()))


if __name__ == "__main__":
    sys.exit(main())
