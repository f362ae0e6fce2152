"""Whose turn it is when a place in the batch is free: tenants alike; in a tenant, priority first, the oldest always.

Pure integers. Why nobody waits for ever:

- Who has had a place before, and was preempted or paused, comes first, in order of arrival.
- Between tenants, those that hold the fewest places; of several such, the one whose oldest request has waited longest.
  So the first place that becomes free goes to a tenant that has none, and a tenant none of whose requests run waits
  for older requests alone, however many tenants come after it.
- Within a tenant, the highest priority and then the oldest; but of any four of its starts in a row that could be the
  oldest's, one is. So the k-th oldest of a tenant starts at the latest with its tenant's 4k-th start. A priority is its
  client's own word, so it moves nothing between tenants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pagestream.server.request import Request

MAX_PASSED_OVER = 3


def next_in_turn(waiting: Sequence[Request], running: Iterable[Request]) -> Request:
    """One of `waiting`, which is in order of arrival and not empty."""
    for request in waiting:
        if request.has_started:
            return request
    places = Counter(request.tenant for request in running)
    oldest = min(waiting, key=lambda request: places[request.tenant])  # the first of several
    if oldest.num_passed_over >= MAX_PASSED_OVER:
        return oldest
    return max(_same_tenant(oldest, waiting), key=lambda request: request.priority)  # the first of several


def take_turn(request: Request, waiting: Sequence[Request]) -> None:
    """Books that `request`, one of `waiting`, starts."""
    oldest = _same_tenant(request, waiting)[0]
    if oldest is not request and not request.has_started:
        oldest.num_passed_over += 1
    request.has_started = True


def _same_tenant(one: Request, waiting: Sequence[Request]) -> list[Request]:
    return [request for request in waiting if request.tenant == one.tenant]
