"""How much of the queue one tenant may fill, so that the others find room in it. Integers and a clock's readings.

Dynamic thresholds, as network switches share their buffers (Choudhury and Hahne 1998): a limit that falls as the queue
fills always leaves room for the next to come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from pagestream.server.waiting import Demand

SHARE = 0.75  # of what the others leave of the queue, for each tenant
_PRESENT_SECONDS = 60.0  # after a tenant has asked, whether it was let in or not


class QueueShare:
    """As long as several tenants are about, each may hold three quarters of what the others leave of the queue, so two
    get 3/7 each and whoever comes next still finds a place. One that is alone may fill it: then the next to come is
    refused, but from then on nobody takes the places that become free before it does, if it tries again.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._present: OrderedDict[str, float] = OrderedDict()  # until when; the next to go first

    def saw(self, tenant: str, now: float) -> None:
        while self._present and next(iter(self._present.values())) <= now:
            self._present.popitem(last=False)
        self._present[tenant] = now + _PRESENT_SECONDS
        self._present.move_to_end(tenant)

    def exceeds(self, tenant: str, waiting: Mapping[str, Demand], requests: int, tokens: int) -> bool:
        """Whether so much more would be too much for one that has something waiting; its first is not its share's
        concern."""
        own = waiting.get(tenant)
        is_alone = len(self._present) == (tenant in self._present)
        if own is None or is_alone:
            return False
        left_requests = self._max_requests - sum(demand.requests for demand in waiting.values()) + own.requests
        left_tokens = self._max_tokens - sum(demand.tokens for demand in waiting.values()) + own.tokens
        return own.requests + requests > SHARE * left_requests or own.tokens + tokens > SHARE * left_tokens
