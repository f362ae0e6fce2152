"""What a request can ask to know beside its answer, and what it is told: plain data, named as in stats.proto.

Times are seconds, entropies nats, masses shares of 1. None: not asked for, not observed, or not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from pagestream.model.step import RECENT_TOKENS, SINK_TOKENS

DEFINITION_VERSION = 1
CAVEAT = (
    "Attention weights show where value vectors were mixed in one head; they are not an explanation of the output. "
    "Numbers are means over heads of a layer group; a few heads can behave differently. "
    "The first token acts as a sink; views labelled rest exclude it. "
    "Computed on rows_observed of rows_total rows; prompt rows, also those from the prefix cache, are not observed "
    "except the last. Entropy tracks length and model, not whether an answer is right. "
    "Causal check: InsightService.AblateSpans."
)


class StatsDetail(IntEnum):
    """How much a request's statistics say; each includes those before. Numbered as in the proto."""

    OFF = 1
    TIMING = 2
    OUTPUT = 3
    ATTENTION = 4
    SPANS = 5


@dataclass(frozen=True, slots=True)
class Span:
    """A named range of the prompt's tokens."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class StatsRequest:
    """What a client asked for."""

    detail: StatsDetail = StatsDetail.OFF
    attention_every: int = 1  # decoded tokens
    spans: tuple[Span, ...] = ()
    page_tokens: int = 0  # of a page of the cache, for whoever reads the answer


@dataclass(frozen=True, slots=True)
class OutputStats:
    entropy_nats: float
    top1_probability: float
    margin: float
    surprisal_nats: float
    sampling_surprisal_nats: float


@dataclass(frozen=True, slots=True)
class TokenAttention:
    entropy_nats: float
    effective_context_tokens: float
    sink_mass: float
    recent_mass: float


@dataclass(frozen=True, slots=True)
class TokenStats:
    context_tokens: int
    gap: float | None = None
    predicted_gap: float | None = None
    stall: float | None = None
    output: OutputStats | None = None
    attention: TokenAttention | None = None


@dataclass(frozen=True, slots=True)
class LayerGroupStats:
    group: str
    entropy_nats: float
    entropy_rest_nats: float
    effective_context_tokens: float
    sink_mass: float
    recent_mass: float
    middle_mass: float
    p_max: float
    mean_log2_distance: float
    entropy_head_min: float
    entropy_head_max: float


@dataclass(frozen=True, slots=True)
class AttentionStructure:
    concentration_nats: float
    routing_nats: float
    coherence_heads: float | None
    coherence_heads_null: float | None
    coherence_layers: float | None
    coherence_layers_null: float | None


@dataclass(frozen=True, slots=True)
class SpanStats:
    name: str
    tokens: int
    mass: float
    lift: float
    mass_without_sink: float
    contribution_share: float
    max_head_mass: float


@dataclass(frozen=True, slots=True)
class StatsMeta:
    rows_observed: int
    rows_total: int
    page_tokens: int
    definition_version: int = DEFINITION_VERSION
    sink_tokens: int = SINK_TOKENS
    recent_tokens: int = RECENT_TOKENS
    caveat: str = CAVEAT


@dataclass(frozen=True, slots=True)
class RequestStats:
    meta: StatsMeta
    stall_suffered: float | None = None
    stall_caused: float | None = None
    prefill_chunks: int = 0
    mean_output_entropy_nats: float | None = None
    mean_surprisal_nats: float | None = None
    attention: tuple[LayerGroupStats, ...] = ()
    band_mass: tuple[float, ...] = ()
    pages_for_95: float | None = None
    structure: AttentionStructure | None = None
    spans: tuple[SpanStats, ...] = ()
