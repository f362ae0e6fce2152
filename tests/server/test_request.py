"""A request's invariants are checked, each by itself."""

from __future__ import annotations

import pytest

from pagestream.model.step import SamplingParams
from pagestream.server.block_pool import BlockPool
from pagestream.server.request import FinishReason, Request, RequestState
from pagestream.server.scheduler import Scheduler


def make_request(prompt: list[int], max_new_tokens: int = 4) -> Request:
    return Request("a", prompt, SamplingParams(), max_new_tokens)


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"num_computed": 5}, "num_computed < len"),
        ({"num_computed": -1}, "num_computed < len"),
        ({"state": RequestState.RUNNING, "num_computed": 3, "block_ids": [0]}, "blocks cover"),
        ({"state": RequestState.PAUSED, "block_ids": [0]}, "only a running request holds blocks"),
        ({"state": RequestState.WAITING, "copy_from": 0}, "only a running request holds blocks"),
        ({"num_computed": 1}, "blocks cover"),
        ({"state": RequestState.FINISHED, "block_ids": [0]}, "only a running request holds blocks"),
        ({"state": RequestState.FINISHED}, "only a finished request has a reason"),
        ({"finish_reason": FinishReason.ERROR}, "only a finished request has a reason"),
    ],
)
def test_check_names_the_broken_invariant(changes: dict[str, object], broken: str) -> None:
    request = make_request([7] * 5)
    request.check(block_size=2)
    for name, value in changes.items():
        setattr(request, name, value)
    with pytest.raises(RuntimeError, match=broken):
        request.check(block_size=2)


def test_a_request_without_prompt_or_without_room_for_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt token"):
        make_request([])
    with pytest.raises(ValueError, match="new token"):
        make_request([7], max_new_tokens=0)


def test_a_request_is_admitted_once() -> None:
    scheduler = Scheduler(BlockPool(8, 2), token_budget=1, max_running=1)
    request = make_request([7])
    scheduler.admit(request)
    with pytest.raises(ValueError, match="admitted before"):
        scheduler.admit(request)
