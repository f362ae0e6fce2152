"""What the scheduler hands to the runner and gets back: plain data, no torch.

The messages belong to the side that receives them, so they live here and the arrow server -> model stays one-way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

SINK_TOKENS, RECENT_TOKENS = 4, 64  # what the sink's and the recent mass are summed over
BANDS = 16


class StatsLevel(IntEnum):
    """How much a step says of one row's attention; each level includes the lower ones."""

    OFF = 0
    HEADS = 1  # means over heads
    PAGES = 2  # and pages, spans, agreement of heads


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
    num_prompt_tokens: int  # without a given answer
    start: int  # tokens before this position are in the cache
    length: int  # of `tokens` and then `proposed`
    block_ids: Sequence[int]  # pages of the request in order; hold positions 0 .. start + length - 1
    sampling: SamplingParams
    copy_from: int | None = None  # a page whose slots below `start` belong into the page of position `start`, first
    proposed: Sequence[int] = ()  # what may follow `tokens`
    attention: StatsLevel = StatsLevel.OFF  # of the row `observed_position`
    spans: Sequence[tuple[int, int]] = ()  # ranges of positions, up to observed_position + 1; need the level PAGES
    output_stats: bool = False
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
    def observed_position(self) -> int:
        """Where attention is observed: the last known token, which is kept whatever becomes of the proposed ones; in a
        chunk that does not reach it, the chunk's last."""
        return min(self.end, len(self.tokens)) - 1

    @property
    def is_prefill(self) -> bool:
        """Whether it computes tokens of the prompt; if so, no others."""
        return self.start < self.num_prompt_tokens

    @property
    def is_decode(self) -> bool:
        """Whether it computes the latest token of an answer, and nothing that was known before it."""
        return not self.is_prefill and not self.given and self.length == 1 + len(self.proposed)

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Known and proposed tokens of positions `start` to `end`, which lies behind `start`."""
        proposed = self.proposed[: max(end - len(self.tokens), 0)]
        return [*self.tokens[start:end], *proposed]

    def without_proposals(self) -> Chunk:
        return replace(self, length=self.length - len(self.proposed), proposed=())


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: every chunk runs in one batch. Tokens of prompts come behind all others."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class OutputStats:
    """Of the model's own distribution: raw logits at temperature 1, before bias, penalties and filters. Nats."""

    entropy: float
    top1: float  # probability of the likeliest token
    margin: float  # between the probabilities of the two likeliest
    surprisal: float  # of the chosen token
    sampling_surprisal: float  # of it under the distribution that it was drawn from; 0 for a greedy choice


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: float | None = None  # natural log, of the model's own distribution; None unless asked for
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token, logprob), best first
    output: OutputStats | None = None  # None unless asked for


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """Of a third of the layers. Nats and shares, means over `heads`; what leaves out the first token is a mean over the
    `rest_heads` that put more than a thousandth elsewhere, and 0 where there are none.
    """

    heads: int  # pairs of layer and head
    entropy: float
    entropy_min: float
    entropy_max: float
    sink_mass: float  # on the first SINK_TOKENS
    recent_mass: float  # on the last RECENT_TOKENS
    p_max: float
    rest_heads: int
    entropy_rest: float
    log2_distance: float  # mean of log2(n - j), which is 0 for the row's own token; without the first token


@dataclass(frozen=True, slots=True)
class SpanSummary:
    """Means over all layers and heads."""

    mass: float
    mass_without_sink: float  # its share of what is not on the first token
    contribution: float  # mean of <o_span, o> / |o|^2, o = sum p_j v_j; may be negative; a partition's sum to 1
    max_head_mass: float
    uniform: float  # the mass it would have if each layer attended alike to all that it sees


@dataclass(frozen=True, slots=True)
class PageSummary:
    """Of each head's mass per page. How far heads agree is, for blocks of 16, 64, 256 and 1,024 tokens that are no
    smaller than a page, of which there are at least two, without the first token: the generalised Jensen-Shannon
    divergence (nats), and coherence, 1 - divergence / its bound, min(log members, log blocks). Members are the heads of
    a layer (means over layers and sizes) or the layers' means over heads (means over sizes). Their nulls shift each
    member's blocks in a circle. None where there is nothing to compare.
    """

    mass: tuple[float, ...]  # per page, mean over heads
    entropy: float  # over pages, mean over heads
    pages95: float  # pages needed for 95 % of the mass, mean over heads
    head_jsd: float | None
    head_jsd_null: float | None
    layer_jsd: float | None
    layer_jsd_null: float | None
    coherence_heads: float | None
    coherence_heads_null: float | None
    coherence_layers: float | None
    coherence_layers_null: float | None
    spans: tuple[SpanSummary, ...]  # as asked
    head_mass: bytes  # float32 [L * Hq, pages], native order: what routing.py adds up


@dataclass(frozen=True, slots=True)
class AttentionSummary:
    """Of one row. `groups` and `bands` are of the early, middle and late third of the layers; a network of fewer than
    three has a group for each.
    """

    context: int  # n: keys that the row may attend to, in the layer where they are most
    groups: tuple[GroupSummary, ...]
    bands: tuple[tuple[float, ...], ...]  # [BANDS]: mass at distances [2^b - 1, 2^(b + 1) - 1), the last open
    pages: PageSummary | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """`sampled[i]` answers `plan.chunks[i]`: a token for each of its `sampled_positions`. Those behind a proposed token
    that differs from what was chosen for its place mean nothing.
    """

    sampled: tuple[tuple[SampledToken, ...], ...]
    attention: tuple[AttentionSummary | None, ...] = ()  # per chunk; empty where none asks
    seconds: tuple[float, float] | None = field(default=None, compare=False)  # of attention, of products with weights
