"""A measurement that breaks is logged once and harms nobody."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from pagestream.server.contained import contained
from pagestream.server.cost_model import CostModel
from pagestream.server.events import Finished
from pagestream.server.metrics import Metrics
from tests.support.fakes import Rig


@pytest.fixture
def nothing_contained() -> None:
    """Not here: these fail on purpose."""


def test_what_fails_has_a_default_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    @contained(-1)
    def reciprocal(number: int) -> int:
        return 6 // number

    with caplog.at_level(logging.ERROR):
        assert [reciprocal(number) for number in (3, 0, 0, 2)] == [2, -1, -1, 3]
    assert [record.message.split(" failed")[0].split(".")[-1] for record in caplog.records] == ["reciprocal"]


def test_an_engine_whose_measurements_fail_answers_on(
    make_metrics: Callable[..., Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(CostModel, "observe", broken)
    monkeypatch.setattr(CostModel, "predict", broken)
    rig = Rig(make_metrics())
    try:
        rig.submit("r", max_new_tokens=20)
        assert isinstance(rig.recorder.end_of("r"), Finished)
    finally:
        rig.close()
