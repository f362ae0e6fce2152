"""The doctor: finds what is there and what is missing, and says what to do."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pagestream.kernels import build
from pagestream.server import __main__ as cli
from pagestream.server.config import ServerConfig
from pagestream.server.doctor import Finding, examine
from tests.support.certificates import make_pair


def findings(config: ServerConfig) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(config)}


def test_a_machine_that_can_serve_is_well(default_model_path: Path) -> None:
    found = findings(ServerConfig(grpc_port=0, http_port=0))
    assert [finding for finding in found.values() if not finding.good] == []
    assert found["model"].found == f"{default_model_path}, checksum right"
    assert build.load().isa in found["kernels"].found
    assert {"CPU", "compiler", "GPU", "memory", "grpc_port", "http_port"} <= found.keys()


def test_what_is_missing_has_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_model_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    monkeypatch.setattr(build, "load", lambda: build.Status("reference", "none", "no compiler"))
    damaged = tmp_path / "models" / default_model_path.name
    damaged.parent.mkdir()
    damaged.write_bytes(b"x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServerConfig(grpc_port=taken.getsockname()[1], http_port=0, device="cuda", cache_dir=tmp_path)
        bad = {what: finding for what, finding in findings(config).items() if not finding.good}
    assert {"compiler", "kernels", "model", "grpc_port"} <= bad.keys()
    assert "not the pinned" in bad["model"].found
    assert all(finding.advice for finding in bad.values())


def test_too_little_memory_is_said(default_model_path: Path) -> None:
    config = ServerConfig(model=str(default_model_path), grpc_port=0, http_port=0, kv_memory=2**50)
    assert not findings(config)["memory"].good


def test_certificate_and_keys_are_tried(tmp_path: Path, default_model_path: Path) -> None:
    own, other = make_pair(tmp_path, "own"), make_pair(tmp_path, "other")
    keys = tmp_path / "keys.toml"
    keys.write_text('[[key]]\nname = "a"\n')
    free: dict[str, Any] = {"grpc_port": 0, "http_port": 0, "tls_cert": own.cert}
    found = findings(ServerConfig(**free, tls_key=own.key, keys_file=keys))
    assert found["certificate"].good
    assert not found["keys"].good
    assert found["keys"].found == f"{keys}: key 1: sha256 must be 64 hex digits in lower case"
    assert not findings(ServerConfig(**free, tls_key=other.key))["certificate"].good


def test_the_command_says_it_in_lines_and_in_its_exit_code(tmp_path: Path) -> None:
    settings = tmp_path / "c.toml"
    settings.write_text("grpc_port = 0\nhttp_port = 0\n")
    result = CliRunner().invoke(cli.app, ["doctor", str(tmp_path), "--config", str(settings)])
    assert result.exit_code == 1
    assert f"✗ model: {tmp_path} holds no config.json\n    → pagestream pull" in result.stdout
    assert "✓ http_port: 127.0.0.1:0 is free\n" in result.stdout
    settings.write_text("nonsense = 1")
    assert CliRunner().invoke(cli.app, ["doctor", "--config", str(settings)]).exit_code == 2
