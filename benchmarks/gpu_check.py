"""Everything that needs a GPU, in one command: `make gpu-check`, or `python benchmarks/gpu_check.py FOLDER`.

Runs on the python3 it is started with and needs no installation: PYTHONPATH=build/tree holds the package. Writes
`gpu-check.log` (all output) and `gpu-check.json` (device, versions, each step's exit code and seconds) into FOLDER, and
exits with 1 if a step failed. On a machine without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch
from record import environment

STEPS = {
    "operators": ["-m", "pytest", "tests/kernels", "-m", "gpu", "-q"],
    "model": ["-m", "pytest", "tests/model", "-m", "gpu", "-q"],
}
SECONDS_PER_STEP = 240


def run(arguments: list[str], log: IO[str]) -> dict[str, float]:
    started = time.monotonic()
    process = subprocess.Popen(  # noqa: S603 - our own steps
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout or ():
        sys.stdout.write(line)
        log.write(line)
    return {"exit_code": process.wait(SECONDS_PER_STEP), "seconds": round(time.monotonic() - started, 1)}


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
        steps = {name: run(arguments, log) for name, arguments in STEPS.items()}
    result = {"benchmark": "gpu-check", "device": torch.cuda.get_device_name(), **environment(), "steps": steps}
    (folder / "gpu-check.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(any(step["exit_code"] for step in steps.values()))


if __name__ == "__main__":
    sys.exit(main())
