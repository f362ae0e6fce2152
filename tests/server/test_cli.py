"""What `serve`, `pull` and the demo do around the server: settings in, one sentence and an exit code out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

from pagestream.model.errors import ModelError, NotEnoughMemoryError
from pagestream.server import __main__ as cli
from pagestream.server import demo
from pagestream.server.config import ServerConfig


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


@pytest.fixture
def replace_server(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[ServerConfig], int]], None]:
    """Puts a function in the place of the real `serve`, which would load a model."""

    def replace(serve: Callable[[ServerConfig], int]) -> None:
        module = ModuleType("pagestream.server.app")
        module.serve = serve  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "pagestream.server.app", module)

    return replace


def test_serve_hands_over_what_was_asked_for(
    replace_server: Callable[[Callable[[ServerConfig], int]], None], tmp_path: Path
) -> None:
    seen: list[ServerConfig] = []
    replace_server(lambda config: seen.append(config) or 7)  # type: ignore[func-returns-value]
    file = tmp_path / "c.toml"
    file.write_text("threads = 2\nmax_running = 3\n")
    result = run(
        "serve", "m.gguf", "--config", str(file), "--threads", "1", "--kv-memory", "1GiB", "--kv-dtype", "bf16"
    )
    assert result.exit_code == 7
    assert seen == [ServerConfig(model="m.gguf", threads=1, max_running=3, kv_memory=2**30, kv_dtype="bf16")]


def test_every_setting_is_a_flag() -> None:
    text = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    flags = {name.replace("_", "-") for name in ServerConfig.__annotations__} - {"model"}
    assert [flag for flag in flags if f"--{flag} " not in text] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--page-size", "33"], "pagestream: --page-size: 33 is not one of 16, 32, 64, 128\n"),
        (["--kv-memory", "lots"], "such as 2GiB, 512MiB or 1.5GB\n"),
        (["--config", "/nowhere.toml"], "pagestream: /nowhere.toml: No such file or directory\n"),
        (["--grpc-port", "8080"], "they must differ\n"),
    ],
)
def test_a_bad_setting_is_one_sentence_and_exit_code_2(arguments: list[str], sentence: str) -> None:
    result = run("serve", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith(sentence)
    assert result.stderr.count("\n") == 1


def test_a_dtype_that_is_not_offered_is_refused() -> None:
    result = run("serve", "--dtype", "int2")
    assert result.exit_code == 2
    assert "int2" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(NotEnoughMemoryError("8 GiB wanted, 4 GiB there: lower --kv-memory"), 3), (OSError("port 50051 is taken"), 1)],
)
def test_a_server_that_cannot_start_is_one_sentence(
    replace_server: Callable[[Callable[[ServerConfig], int]], None], error: Exception, code: int
) -> None:
    def serve(config: ServerConfig) -> int:
        raise error

    replace_server(serve)
    result = run("serve")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"pagestream: {error}\n")


def test_pull_prints_where_the_model_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(cache_dir: Path, progress: Callable[[str], None]) -> Path:
        progress("fetching 98 MB")
        return cache_dir / "m.gguf"

    monkeypatch.setattr(cli, "fetch_default_model", fetch)
    result = run("pull", "--cache-dir", str(tmp_path))
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{tmp_path}/m.gguf\n", "fetching 98 MB\n")


def test_pull_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(cache_dir: Path, progress: Callable[[str], None]) -> Path:
        raise ModelError("no network")

    monkeypatch.setattr(cli, "fetch_default_model", fetch)
    result = run("pull")
    assert (result.exit_code, result.stderr) == (3, "pagestream: no network\n")


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "pull", "health"])
def test_help_shows_an_example_and_the_exit_codes(command: str) -> None:
    text = run(command, "--help").stdout
    assert re.search(rf"Examples?:.*pagestream {command}", text, re.DOTALL)
    assert "Exit codes: 0" in text


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "pagestream.server", "--version"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == f"pagestream {metadata.version('pagestream')}\n"


def fake_python(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Makes the demo start this shell script in place of its server."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(demo.sys, "executable", str(file))
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)  # the handlers are for a process of its own


def test_the_demo_shows_the_last_words_of_a_server_that_dies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake_python(monkeypatch, tmp_path, "echo loading; echo out of memory >&2; exit 3")
    assert demo.main() == 1
    shown = capsys.readouterr().out
    assert "the server ended with exit code 3 before it was ready" in shown
    assert shown.endswith("loading\n  out of memory\n")


def test_the_demo_leaves_no_server_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A server that never gets ready and does not hear SIGTERM."""
    servers: list[demo.Server] = []

    class Recorded(demo.Server):
        def __init__(self) -> None:
            super().__init__()
            servers.append(self)

    fake_python(monkeypatch, tmp_path, "trap '' TERM; exec sleep 600")
    monkeypatch.setattr(demo, "Server", Recorded)
    monkeypatch.setattr(demo, "START_SECONDS", 0.5)
    monkeypatch.setattr(demo, "STOP_SECONDS", 0.5)
    assert demo.main() == 1
    assert "not ready within 0.5 s" in capsys.readouterr().out
    with pytest.raises(ProcessLookupError):
        os.kill(servers[0]._process.pid, 0)
