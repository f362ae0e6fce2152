"""Damaged model and tokenizer files are read or refused by name, within bounds of time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path) -> None:
    """500 of the 10,000 of `make fuzz`, in a process of its own, which a crash or a hang would end."""
    progress = tmp_path / "seed"
    command = [sys.executable, "-m", "tests.support.fuzz_files", "--count", "500", "--progress", str(progress)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert run.stdout, f"it ended at seed {progress.read_text()} with {run.returncode}: {run.stderr[-2000:]}"
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["untyped"] == []
    assert result["files"] == 500
    assert result["resident_mb_peak"] < 1000
    outcomes = {name.partition(": ")[2] for name in result["outcomes"]}
    assert outcomes == {"read", "refused"}
