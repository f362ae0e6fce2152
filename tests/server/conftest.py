"""Fixtures of the server's tests."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pagestream.server.metrics import Metrics


@pytest.fixture(scope="session")
def make_metrics() -> Callable[..., Metrics]:
    """Makes Metrics whose model is loaded."""

    def make(clock: Callable[[], float] = time.monotonic, model: str = "m") -> Metrics:
        metrics = Metrics(clock)
        metrics.set_model(
            model,
            load_seconds=1.5,
            architecture="llama",
            dtype="fp32",
            device="cpu",
            max_context=2048,
            block_size=16,
            num_blocks=100,
            kv_dtype="fp32",
        )
        return metrics

    return make
