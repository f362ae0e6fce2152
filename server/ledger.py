"""Who waits for whom: what lies between the tokens of a stream beyond what decoding takes, and who caused it.

A gap is compared with the forecast of a step of the same decodes alone. What is above it is charged

- to the prompts read in the step, as far as the cost model says that they made it longer, each its share of what the
  model says that they cost together;
- to preemption, all of it, if the request lost its place since its last token;
- else to nobody: the step was slower than the model says, or the request was out of the batch for its reader's sake.

Sums are exact: times are whole nanoseconds, and what the streams suffered from prompts is what the prompts caused. As
long as the cost model knows too little, nothing is charged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pagestream.server.cost_model import CostModel, Work

NANOSECONDS = 1_000_000_000


@dataclass(slots=True)
class Account:
    """Of one request. `predicted_gap` and `stall` are of its latest token, in seconds; None without a forecast."""

    suffered_ns: int = 0
    caused_ns: int = 0
    prefill_chunks: int = 0
    predicted_gap: float | None = None
    stall: float | None = None
    num_preemptions: int = 0  # that it had at its latest token
    last_step: int = -1  # in which it got that

    @property
    def suffered(self) -> float:
        """Seconds that others' prompts added between its tokens."""
        return self.suffered_ns / NANOSECONDS

    @property
    def caused(self) -> float:
        """Seconds that its prompt added between others' tokens, summed over them."""
        return self.caused_ns / NANOSECONDS


class TokenOf(NamedTuple):
    """A request that got a token in a step."""

    account: Account
    gap: float | None  # seconds since the one before; None for its first
    num_preemptions: int


class PromptChunk(NamedTuple):
    """What a step read of a prompt."""

    account: Account
    prompt_tokens: int  # of the whole prompt
    work: Work


class Stalls(NamedTuple):
    """What a step's streams suffered, in nanoseconds, and by whom, with the length of the causer's prompt."""

    prefill: int = 0
    preemption: int = 0
    other: int = 0
    caused: tuple[tuple[int, int], ...] = ()


class Ledger:
    """Used by the engine's thread alone."""

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self._step = 0

    def charge(self, work: Work, tokens: Sequence[TokenOf], chunks: Sequence[PromptChunk]) -> Stalls:
        """Books a step that computed `work`."""
        self._step += 1
        for chunk in chunks:
            chunk.account.prefill_chunks += 1
        decodes = Work(work.rows, work.contexts)
        known = self._model.knows("decode") and (not chunks or self._model.knows("prefill"))
        expected = self._model.predict(decodes)
        by_prompts = max(round((self._model.predict(work) - expected) * NANOSECONDS), 0) if chunks else 0
        prefill = preemption = other = 0
        for account, gap, num_preemptions in tokens:
            account.predicted_gap = account.stall = None
            if known and gap is not None:
                account.predicted_gap = expected
                excess = max(round((gap - expected) * NANOSECONDS), 0)
                was_preempted = num_preemptions > account.num_preemptions
                was_in_the_last_step = account.last_step == self._step - 1
                stall = min(excess, by_prompts) if was_in_the_last_step and not was_preempted else 0
                account.suffered_ns += stall
                account.stall = stall / NANOSECONDS
                prefill += stall
                if was_preempted:
                    preemption += excess
                else:
                    other += excess - stall
            account.num_preemptions, account.last_step = num_preemptions, self._step
        return Stalls(prefill, preemption, other, self._share_out(prefill, chunks))

    def _share_out(self, charge: int, chunks: Sequence[PromptChunk]) -> tuple[tuple[int, int], ...]:
        """`charge` nanoseconds, all of them, in proportion to what the chunks are said to cost."""
        if not charge:
            return ()
        costs = [self._model.prompt_seconds(chunk.work) for chunk in chunks]
        left, cost_left = charge, sum(costs)
        shares = []
        for chunk, cost in zip(chunks, costs, strict=True):
            last = chunk is chunks[-1]
            share = left if last or cost_left <= cost else round(left * cost / cost_left)
            left, cost_left = left - share, cost_left - cost
            chunk.account.caused_ns += share
            shares.append((chunk.prompt_tokens, share))
        return tuple(shares)
