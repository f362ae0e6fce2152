"""Who gets how many of a step's prompt tokens: tenants alike; within a tenant, short prompts soon, the oldest always.

Pure integers. Why nothing starves:

- The oldest prompt of all gets at least one token in every step.
- Tenants that have prompts to read get equal counts of tokens: each step's go to those that have had the fewest. So of
  two tenants that always have some, none is ever ahead of the other by more than one step's tokens, and one that was
  away comes back with no credit.
- A tenant's oldest prompt gets a quarter of its tenant's tokens, the rest goes by priority and then where least is left
  to read. So a short prompt waits for no long one, and prompts of one length are read one after the other, as that ends
  the most of them early.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagestream.server.request import Request


class FairShare:
    """Remembers what each tenant has had, as long as it matters."""

    def __init__(self) -> None:
        self._had: dict[str, int] = {}  # tokens, as if every tenant had begun with `_level`
        self._level = 0  # the least that any tenant with prompts to read has had; it never falls

    def divide(self, prompts: Sequence[Request], budget: int) -> list[tuple[Request, int]]:
        """Shares out `budget` tokens, all of them if so many are left to read. Takes and returns prompts in order of
        arrival; leaves out those that get nothing.
        """
        tenants: dict[str, list[Request]] = {}
        for request in prompts:
            tenants.setdefault(request.tenant, []).append(request)
        if not tenants:
            return []
        self._had |= {tenant: max(self._had.get(tenant, 0), self._level) for tenant in tenants}
        granted = self._grant(tenants, prompts[0], budget)
        shares = {
            request: share
            for tenant, requests in tenants.items()
            for request, share in _within_tenant(requests, granted[tenant]).items()
        }
        for tenant, tokens in granted.items():
            self._had[tenant] += tokens
        self._level = max(self._level, min(self._had[tenant] for tenant in tenants))
        self._had = {tenant: had for tenant, had in self._had.items() if had > self._level}
        return [(request, shares[request]) for request in prompts if shares[request]]

    def _grant(self, tenants: dict[str, list[Request]], oldest: Request, budget: int) -> dict[str, int]:
        """Tokens for each tenant: fills up from those that have had the fewest."""
        left = {tenant: sum(request.num_uncomputed for request in requests) for tenant, requests in tenants.items()}
        granted = dict.fromkeys(tenants, 0)

        def give(tenant: str, tokens: int) -> None:
            nonlocal budget
            granted[tenant] += tokens
            left[tenant] -= tokens
            budget -= tokens

        give(oldest.tenant, min(1, budget))
        while budget:
            hungry = [tenant for tenant in tenants if left[tenant]]
            if not hungry:
                break
            levels = {tenant: self._had[tenant] + granted[tenant] for tenant in hungry}
            lowest = min(levels.values())
            last = [tenant for tenant in hungry if levels[tenant] == lowest]
            step = min(left[tenant] for tenant in last)
            if len(last) < len(hungry):
                step = min(step, min(level for level in levels.values() if level > lowest) - lowest)
            step = min(step, max(1, budget // len(last)))
            for tenant in last:
                give(tenant, min(step, budget))
        return granted


def _within_tenant(requests: Sequence[Request], budget: int) -> dict[Request, int]:
    """The oldest's quarter, then by priority the shortest remainders."""
    shares = dict.fromkeys(requests, 0)
    oldest = requests[0]
    shares[oldest] = min(-(-budget // 4), oldest.num_uncomputed)
    budget -= shares[oldest]
    for request in sorted(requests, key=lambda r: (-r.priority, r.num_uncomputed)):  # stable: ties by arrival
        share = min(budget, request.num_uncomputed - shares[request])
        shares[request] += share
        budget -= share
    return shares
