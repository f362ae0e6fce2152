"""Messages that no client means end OK or in a status with a reason, and leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.support.fuzz_wire import storm
from tests.support.service import Service
from tests.support.waiting import wait_until


def test_every_message_ends_in_a_typed_status(make_service: Callable[..., Service]) -> None:
    """4,000 of the million of `make fuzz`."""
    service = make_service(num_blocks=4)  # short answers
    outcomes = asyncio.run(storm(service.address, range(4000)))
    assert outcomes.total() == 4000
    assert [outcome for outcome in outcomes if outcome.startswith("untyped")] == []
    assert {"OK", "INVALID_FIELD", "UNKNOWN_MODEL"} <= outcomes.keys()
    wait_until(service.is_idle, "every call is over")
    assert service.client.stream(text="ab", stop={"max_tokens": 2}).text == "ab"
