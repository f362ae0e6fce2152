"""The queue: requests that wait, in order of arrival, and what it takes to read them, always up to date. Integers."""

from __future__ import annotations

from typing import NamedTuple, SupportsIndex

from pagestream.server.request import Request

_MAX_BITS = 40  # more than any prompt's length has


class Total(NamedTuple):
    """Sums over the waiting requests whose lengths, in binary, have equally many digits."""

    requests: int = 0
    tokens: int = 0
    squares: int = 0  # of the lengths in tokens


class Demand(NamedTuple):
    """What waits of one tenant."""

    requests: int = 0
    tokens: int = 0


class WaitingQueue(list[Request]):
    """A request's length does not change while it waits."""

    def __init__(self) -> None:
        super().__init__()
        self._totals = [Total()] * _MAX_BITS  # by the number of binary digits of the length
        self.tenants: dict[str, Demand] = {}  # only tenants of whom something waits

    @property
    def totals(self) -> list[Total]:
        """Those that are not empty, shortest requests first; lengths within one differ by less than a factor of 2."""
        return [total for total in self._totals if total.requests]

    def append(self, request: Request) -> None:
        super().append(request)
        self._count(request, 1)

    def insert(self, index: SupportsIndex, request: Request) -> None:
        super().insert(index, request)
        self._count(request, 1)

    def remove(self, request: Request) -> None:
        super().remove(request)
        self._count(request, -1)

    def _count(self, request: Request, sign: int) -> None:
        length = request.num_tokens
        bits = length.bit_length()
        requests, tokens, squares = self._totals[bits]
        self._totals[bits] = Total(requests + sign, tokens + sign * length, squares + sign * length * length)
        demand = self.tenants.pop(request.tenant, Demand())
        if demand.requests + sign:
            self.tenants[request.tenant] = Demand(demand.requests + sign, demand.tokens + sign * length)
