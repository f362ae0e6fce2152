"""A request as the scheduler sees it: integers and states. No torch, grpc, asyncio or clock here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto

from pagestream.model.step import SampledToken, SamplingParams
from pagestream.server.prompt_lookup import PromptLookup


class RequestState(Enum):
    WAITING = auto()  # not yet scheduled, preempted, or back from a pause
    RUNNING = auto()
    PAUSED = auto()  # its reader is behind
    FINISHED = auto()


class Priority(IntEnum):
    """Whose turn it is among the requests of one tenant (places.py, fair_share.py)."""

    LOW = -1
    NORMAL = 0
    HIGH = 1


class FinishReason(Enum):
    """Why a request ended. The values are metric labels; the first six are answers, the others failures."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"  # noqa: S105 - the token of a text, not of a login
    MAX_TOKENS = "max_tokens"
    MAX_CONTEXT = "max_context"
    SCORED = "scored"  # its given answer
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    QUEUE_TIMEOUT = "queue_timeout"
    SLOW_READER = "slow_reader"
    ERROR = "error"
    SHUTDOWN = "shutdown"


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way. `num_computed` tokens catch up with `tokens`; there are no phases.

    `check` holds the invariants: 0 <= num_computed < len(tokens); its blocks cover its computed tokens; it holds blocks
    only while it runs.
    """

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingParams
    max_new_tokens: int  # already clamped to the model's context and the pool
    max_tokens_is_capacity: bool = False  # the clamp decided: ending there is MAX_CONTEXT, not MAX_TOKENS
    eos_token_ids: frozenset[int] = frozenset()  # empty when the client ignores them
    stop_token_ids: frozenset[int] = frozenset()
    tenant: str = ""  # opaque; tenants share places in the batch and prompt tokens alike
    priority: Priority = Priority.NORMAL  # among the requests of its tenant
    starts_after: Request | None = None  # one whose prompt it finds in the cache, as far as it begins like its own
    given: Sequence[int] = ()  # an answer to score; the prompt ends in all of it but the last token

    tokens: list[int] = field(init=False)  # prompt, then output
    num_computed: int = field(default=0, init=False)
    block_ids: list[int] = field(default_factory=list, init=False)
    state: RequestState = field(default=RequestState.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    num_preemptions: int = field(default=0, init=False)
    num_computed_before: int = field(default=0, init=False)  # the most it had before it waited again
    num_cached: int | None = field(default=None, init=False)  # prompt tokens found in cache; None until it ran
    copy_from: int | None = field(default=None, init=False)  # a page it holds until its beginning is copied to its own
    arrival: int | None = field(default=None, init=False)  # admission order; None until admitted
    has_started: bool = field(default=False, init=False)  # it has had a place in the batch
    lookup: PromptLookup = field(default_factory=PromptLookup, init=False)  # what may come next
    num_passed_over: int = field(default=0, init=False)  # younger ones of its tenant that took a place first
    scores: list[SampledToken] = field(default_factory=list, init=False)  # of the tokens given, in order, so far

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a request needs at least one prompt token")
        if self.max_new_tokens < 1:
            raise ValueError("a request must be allowed at least one new token")
        if self.given and self.prompt[len(self.prompt) - len(self.given) + 1 :] != self.given[:-1]:
            raise ValueError("the prompt must end in the given answer, but for its last token")
        self.tokens = list(self.prompt)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def answer_start(self) -> int:
        """Where the tokens of the answer begin, chosen or given."""
        return self.num_prompt_tokens - max(len(self.given) - 1, 0)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    @property
    def num_reusable(self) -> int:
        """How many of its tokens need not be computed if they are found: behind the next one, a token is chosen."""
        return self.num_tokens - max(len(self.given) - len(self.scores), 1)

    def final_length(self, capacity: int) -> int:
        """The most tokens it will ever hold in a cache of `capacity`: its last token is never computed."""
        return min(self.num_prompt_tokens + self.max_new_tokens - 1, capacity)

    def drop_last(self, count: int) -> None:
        """Forgets its last `count` tokens, because its answer ends before them; it must be finished next."""
        del self.tokens[len(self.tokens) - count :]

    @property
    def may_start(self) -> bool:
        first = self.starts_after
        return first is None or first.num_output_tokens > 0 or first.is_finished

    def reason_to_finish(self, capacity: int) -> FinishReason | None:
        """Why its latest token ends it; None if it goes on. A pool of `capacity` tokens must hold all but that one."""
        if self.given:
            return FinishReason.SCORED if len(self.scores) == len(self.given) else None
        token_id = self.tokens[-1]
        if token_id in self.eos_token_ids:
            return FinishReason.END_OF_SEQUENCE
        if token_id in self.stop_token_ids:
            return FinishReason.STOP_TOKEN
        if self.num_output_tokens >= self.max_new_tokens:
            return FinishReason.MAX_CONTEXT if self.max_tokens_is_capacity else FinishReason.MAX_TOKENS
        if self.num_tokens > capacity:  # it could never be computed
            return FinishReason.MAX_CONTEXT
        return None

    def check(self, block_size: int) -> None:
        """Raises RuntimeError if an invariant does not hold."""
        invariants = {
            "0 <= num_computed < len(tokens)": 0 <= self.num_computed < len(self.tokens),
            "blocks cover the computed tokens": self.is_finished
            or self.num_computed <= len(self.block_ids) * block_size,
            "only a running request holds blocks": self.state is RequestState.RUNNING
            or (not self.block_ids and self.copy_from is None),
            "only a finished request has a reason": self.is_finished == (self.finish_reason is not None),
        }
        broken = [invariant for invariant, holds in invariants.items() if not holds]
        if broken:
            raise RuntimeError(f"request {self.request_id}: not true that {'; '.join(broken)}")
