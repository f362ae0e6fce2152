"""Fixtures of the server's tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pagestream.server.metrics import Metrics
from tests.support.fakes import CHAT_TEMPLATE, ByteTokenizer
from tests.support.service import Service


@pytest.fixture(autouse=True)
def nothing_contained(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A measurement that fails ends no request in a server, but it does end its test."""
    yield
    assert not [record for record in caplog.get_records("call") if record.name == "pagestream.server.contained"]


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


@pytest.fixture
def make_service(make_metrics: Callable[..., Metrics]) -> Iterator[Callable[..., Service]]:
    """Opens services around a chat template and an engine with these settings."""
    services: list[Service] = []

    def make(template: str | None = CHAT_TEMPLATE, tokenizer: ByteTokenizer | None = None, **settings: Any) -> Service:
        services.append(Service(make_metrics(), tokenizer or ByteTokenizer(template), **settings))
        return services[-1]

    yield make
    for service in services:
        service.close()


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    return make_service()
