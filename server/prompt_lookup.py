"""What may come next in an answer: what followed the last time that its latest tokens stood in its prompt or in itself.

Prompt lookup decoding: a step computes the proposed tokens together with the latest one and keeps those that it would
have chosen anyway, so a proposal changes how long an answer takes and never what it says. Pure integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_PROPOSED = 7  # a step of 8 rows takes twice as long as one of a single row
_SIZES = (3, 2)  # of the n-grams looked up, the surest first
_WORTH = 0.25  # a token less likely to be kept is not proposed: its row costs a tenth of a step and saves a part of one
_WEIGHT = 0.2  # of the latest token in the estimated acceptance
_RETRY = 32  # where proposals keep failing, one is tried at every 32nd opportunity


class PromptLookup:
    """Of one request, whose tokens only grow. O(1) for each token, however often it is asked."""

    def __init__(self) -> None:
        self._following: dict[tuple[int, ...], int] = {}  # n-gram -> position after it, where it occurred last
        self._num_indexed = 0  # positions
        self._acceptance = 0.4  # estimated probability that a proposed token is right if those before it were
        self._passed_over = 0  # opportunities since the last trial

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow `tokens`: as many as are worth their rows, so often none."""
        self._index(tokens)
        start = next(filter(None, (self._following.get(tuple(tokens[-size:])) for size in _SIZES)), None)
        if start is None or limit < 1:
            return []
        period = len(tokens) - start  # beyond the end of `tokens`, the loop goes on
        return [tokens[start + i % period] for i in range(min(self._num_worthwhile(), limit))]

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """What came of a proposal: the first `num_accepted` tokens were right, the next one was not."""
        for is_right in [True] * num_accepted + [False] * (num_accepted < num_proposed):
            self._acceptance += _WEIGHT * (is_right - self._acceptance)

    def _num_worthwhile(self) -> int:
        """So many that even the last, which is kept only if all before it are, is so with a probability of `_WORTH`."""
        if self._acceptance >= _WORTH:
            return min(int(math.log(_WORTH) / math.log(self._acceptance)), MAX_PROPOSED)
        self._passed_over = (self._passed_over + 1) % _RETRY
        return 1 if self._passed_over == 0 else 0

    def _index(self, tokens: Sequence[int]) -> None:
        """Up to the n-grams that end before the last token: something follows them."""
        for end in range(max(self._num_indexed, 1), len(tokens)):
            for size in _SIZES:
                if end >= size:
                    self._following[tuple(tokens[end - size : end])] = end
        self._num_indexed = len(tokens)
