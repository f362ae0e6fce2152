"""Fixtures that several folders share."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.support.process import ServerProcess

# By the clock, an example may take any time: how long is a matter of what else the machine does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
_SERVERS = pytest.StashKey["list[ServerProcess]"]()


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's GGUF file in the user's cache, as `make setup` leaves it there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pagestream"
    path = cache / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("the default model is not in the cache: run `make setup`")
    return path


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with 4,096 tokens of context, a byte-level tokenizer and a chat template."""
    from tests.support.tiny_model import save_tiny_model  # transformers takes seconds to import

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def serve(request: pytest.FixtureRequest) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers: a model's path, then command line arguments. Their logs are shown if a test fails."""
    from tests.support.process import ServerProcess  # needs packages that machines with a GPU may lack

    servers: list[ServerProcess] = []
    request.config.stash[_SERVERS] = servers

    def start(model: Path, *arguments: str, ready: bool = True) -> ServerProcess:
        server = ServerProcess(model, *arguments)
        servers.append(server)
        if ready:
            server.wait_until_ready()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections += [("server log", "".join(s.log)) for s in item.config.stash.get(_SERVERS, [])]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests measured with `record_property`."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")
