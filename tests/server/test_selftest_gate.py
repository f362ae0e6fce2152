"""A server whose attention is wrong never becomes ready: it ends with one sentence that says so."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pagestream.kernels import operators, selftest
from pagestream.server import __main__ as cli
from pagestream.server.app import serve
from pagestream.server.assemble import assemble
from pagestream.server.config import ServerConfig
from pagestream.server.metrics import Metrics

assert serve  # imported here, so that its weight is not the test's


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    yield
    gc.enable()  # off while a server starts


def forgetful(*tensors: torch.Tensor, **options: Any) -> None:
    """A kernel that loses the oldest page."""
    query, key_cache, value_cache, tables, starts, lengths = tensors
    tables = torch.where(torch.arange(tables.shape[1]) == 0, tables[:, -1:], tables)
    operators.paged_attention(query, key_cache, value_cache, tables, starts, lengths, **options)


def test_a_broken_kernel_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, tiny_model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(selftest, "paged_attention", forgetful)
    ports = ["--grpc-port", "0", "--http-port", "0", "--device", "cpu"]
    result = CliRunner().invoke(cli.app, ["serve", str(tiny_model_path), *ports])
    assert result.exit_code == cli.NO_MODEL
    assert result.stderr.startswith("pagestream: attention on cpu computes wrong results: self-test T1 (")
    assert result.stderr.count("\n") == 1
    assert not any("ready:" in message for message in caplog.messages)


def test_what_was_checked_is_in_the_metrics(tiny_model_path: Path, tmp_path: Path) -> None:
    metrics = Metrics()
    config = ServerConfig(model=str(tiny_model_path), device="cpu", cache_dir=tmp_path, kv_memory=2**24)
    model = assemble(config, metrics, lambda _publication: None, lambda: None)
    model.engine.stop()
    values = metrics.read().values
    assert values["selftest_ok"] == {(test,): True for test in selftest.TESTS}
    assert all(0 <= values["selftest_max_error"][test,] <= 1 for test in selftest.TESTS)
    assert 0 < values["selftest_seconds"][()] < 30  # under any load
