"""The wheel holds everything that is under version control in the five folders, under one name, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {name: name for name in ("server", "model", "kernels", "loadtest")} | {"protos/pagestream/v1": "v1"}
SUFFIXES = {".py", ".pyi", ".proto", ".h", ".cpp", ".cu", ".cuh", ".typed", ".j2", ".html", ".css", ".js", ".txt"}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of all files in a wheel built from this tree, with the build tools that are installed."""
    target = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):  # a copy, so that no build folder appears in the tree
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_everything_is_under_one_name(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pagestream"}


def test_nothing_is_missing(wheel_names: set[str]) -> None:
    expected = set()
    listing = ["git", "ls-files", "-z", *FOLDERS, ":!loadtest/cards"]  # results, not part of the program
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if Path(name).suffix in SUFFIXES and (ROOT / name).is_file():
            folder = next(folder for folder in FOLDERS if name.startswith(f"{folder}/"))
            expected.add(f"pagestream/{FOLDERS[folder]}/{name.removeprefix(f'{folder}/')}")
    assert expected
    assert expected <= wheel_names
    assert {name for name in wheel_names if name.startswith("pagestream/")} == expected
