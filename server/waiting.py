"""The queue: requests that wait, in order of arrival, and what it takes to read them, always up to date. Integers."""

from __future__ import annotations

from typing import NamedTuple, SupportsIndex

from pagestream.server.request import Request

_LENGTHS = 40  # more bits than any prompt's length has


class Waiting(NamedTuple):
    """Of requests of about one length."""

    requests: int = 0
    tokens: int = 0
    squares: int = 0  # of their lengths


class Demand(NamedTuple):
    """Of a tenant."""

    requests: int = 0
    tokens: int = 0


class WaitingQueue(list[Request]):
    """A request's length does not change while it waits."""

    def __init__(self) -> None:
        super().__init__()
        self._totals = [Waiting()] * _LENGTHS  # by the bits of the length
        self.tenants: dict[str, Demand] = {}  # those that wait

    @property
    def totals(self) -> list[Waiting]:
        """By length, which at most doubles from one to the next; those that there are."""
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
        total = self._totals[length.bit_length()]
        self._totals[length.bit_length()] = Waiting(
            total.requests + sign, total.tokens + sign * length, total.squares + sign * length * length
        )
        demand = self.tenants.pop(request.tenant, Demand())
        if demand.requests + sign:
            self.tenants[request.tenant] = Demand(demand.requests + sign, demand.tokens + sign * length)
