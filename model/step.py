"""What the scheduler hands to the runner and gets back: plain data, no torch.

The messages belong to the side that receives them, so they live here and the arrow server -> model stays one-way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

MAX_SCORED_ROWS = 64  # of a step: bounds the memory of their logits


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request chooses its tokens; validated where the request enters, the ranges are those of
    protos/pagestream/v1/generation.proto. A token at a given position depends only on the logits, these fields
    and the position, never on the batch, so a preempted request continues as if nothing had happened.
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: int | None = None  # how many most likely tokens to report beside the chosen one
    min_tokens: int = 0
    suppressed_until_min_tokens: frozenset[int] = frozenset()  # end and stop tokens, never chosen before min_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Work on one request in one step: compute the keys and values of `length` tokens from position `start`, and, when
    they reach the last known one, choose the next. After that one may come `proposed` tokens, which count as part of
    `length`: behind each, too, the next is chosen, as if those before it were the request's own.

    Where an answer is `given`, its tokens are "chosen", whatever the network would choose: they are what `tokens` ends
    in, but for the last, which comes behind them.
    """

    request_id: str
    tokens: Sequence[int]  # all known tokens, prompt then output; a live view: read it only during the step
    num_prompt_tokens: int
    start: int  # tokens before this position are in the cache
    length: int  # of `tokens` and then `proposed`
    block_ids: Sequence[int]  # pages of the request in order; hold positions 0 .. start + length - 1
    sampling: SamplingParams
    copy_from: int | None = None  # a page whose slots below `start` belong into the page of position `start`, first
    proposed: Sequence[int] = ()  # what may follow `tokens`
    given: Sequence[int] = ()  # the tokens of a given answer that are still to be chosen

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def samples(self) -> bool:
        return self.end >= len(self.tokens)

    @property
    def sampled_positions(self) -> range:
        """Where a token is chosen: behind the last known one and each proposed one, and wherever a given one is; empty
        if that is not reached."""
        first = max(self.first_chosen, self.start + 1) if self.given else len(self.tokens)
        return range(first, self.end + 1)

    @property
    def first_chosen(self) -> int:
        """The first position with a given token that is still to be chosen."""
        return len(self.tokens) + 1 - len(self.given)

    @property
    def is_decode(self) -> bool:
        """Whether it computes the latest token of an answer, and nothing that was known before it."""
        return self.start >= self.num_prompt_tokens and self.length == 1 + len(self.proposed)

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Known and proposed tokens of positions `start` to `end`, which lies behind `start`."""
        proposed = self.proposed[: max(end - len(self.tokens), 0)]
        return [*self.tokens[start:end], *proposed]

    def without_proposals(self) -> Chunk:
        return replace(self, length=self.length - len(self.proposed), proposed=())


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: every chunk runs in one batch. Decodes come first, then prompt chunks."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: float | None = None  # natural log, of the model's own distribution; None unless asked for
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token, logprob), best first


@dataclass(frozen=True, slots=True)
class StepResult:
    """`sampled[i]` answers `plan.chunks[i]`: a token for each of its `sampled_positions`. Those behind a proposed token
    that differs from what was chosen for its place mean nothing.
    """

    sampled: tuple[tuple[SampledToken, ...], ...]
