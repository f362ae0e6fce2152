"""Everything that needs a GPU, in one command: `make gpu-check`, or `python benchmarks/gpu_check.py FOLDER`.

Runs on the python3 it is started with and needs no installation and no network: PYTHONPATH=build/tree holds the
package. Into FOLDER it writes `gpu-check.log` (all output), `gpu-check.json` (device, versions, and of each step its
exit code, seconds and lines of JSON, when it ends) and `build.log` (the compiler's report). Exits with 1 if a step
failed; on a machine without a GPU, or whose python3 has no torch, it says so and exits with 2.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"{sys.executable} has no torch; name one that has: make gpu-check PYTHON=...")
from record import environment

PYTHON = (sys.executable,)
SANITIZER = (shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer", "--error-exitcode", "9")
PYTEST = (*PYTHON, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
SHORT = ("tests/kernels/test_cuda_device.py", "-k", "window or padded or append or (float8 and mixed)")
# Programs, arguments, and seconds after which a step is given up: 9 minutes in all.
STEPS: dict[str, tuple[tuple[str, ...], int]] = {
    "build": ((*PYTHON, "-m", "pagestream.kernels.build", "--cuda"), 110),
    "operators": ((*PYTEST, "tests/kernels"), 100),
    "memcheck": ((*SANITIZER, "--tool", "memcheck", *PYTEST, *SHORT), 60),
    "racecheck": ((*SANITIZER, "--tool", "racecheck", *PYTEST, *SHORT), 60),
    "benchmark": ((*PYTHON, "-m", "pagestream.kernels.bench_cuda"), 160),
    "model": ((*PYTEST, "tests/model/test_devices.py"), 50),
}


def run(arguments: tuple[str, ...], limit_s: float, log: IO[str]) -> dict[str, Any]:
    """Exit code (-9: given up, 127: no such program), seconds and lines of JSON of one step."""
    started = time.monotonic()
    try:
        # A group of its own: what the step started is given up with it, and would else hold the pipe open.
        process = subprocess.Popen(  # noqa: S603 - our own steps
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    except FileNotFoundError as error:
        log.write(f"{error}\n")
        return {"exit_code": 127, "seconds": 0}
    timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    results = []
    for line in process.stdout or ():
        sys.stdout.write(line)
        log.write(line)
        log.flush()
        if line.startswith('{"benchmark"') and line.endswith("\n"):  # a step that is given up may end within one
            results.append(json.loads(line))
    exit_code = process.wait()
    timer.cancel()
    seconds = round(time.monotonic() - started, 1)
    return {"exit_code": exit_code, "seconds": seconds} | ({"results": results} if results else {})


def keep_compiler_report(folder: Path) -> None:
    """build.log lies beside the library, in the cache folder of a machine that may soon be gone."""
    from pagestream.kernels import build  # noqa: PLC0415 - a step before this one compiles

    report = build.build(with_cuda=True).parent / "build.log"
    if report.exists():
        shutil.copy(report, folder)


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
        steps: dict[str, dict[str, Any]] = {}
        result = {"benchmark": "gpu-check", "device": torch.cuda.get_device_name(), **environment(), "steps": steps}
        for name, (arguments, limit_s) in STEPS.items():
            steps[name] = run(arguments, limit_s, log)
            (folder / "gpu-check.json").write_text(json.dumps(result, indent=1) + "\n")
            if name == "build" and steps[name]["exit_code"] == 0:
                keep_compiler_report(folder)
    return int(any(step["exit_code"] for step in steps.values()))


if __name__ == "__main__":
    sys.exit(main())
