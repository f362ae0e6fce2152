"""Seconds of what `make soak` does for ten minutes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.process import ServerProcess
from tests.support.soak import SERVER, soak


@pytest.mark.slow
def test_random_clients_leave_nothing_behind(serve: Callable[..., ServerProcess], tiny_model_path: Path) -> None:
    result = soak(serve(tiny_model_path, *SERVER), events=600, seconds=15.0, rounds=0)
    print(json.dumps(result))  # noqa: T201
    assert result["leaked_blocks"] == 0
    assert result["events"] >= 100
    assert result["exit_code"] == 0
