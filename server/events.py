"""What the engine tells the outside about a request. Plain data; translate.py turns it into messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pagestream.model.step import SampledToken
from pagestream.server.errors import RequestError
from pagestream.server.request import FinishReason
from pagestream.server.stats import RequestStats, TokenStats


@dataclass(frozen=True, slots=True)
class Progress:
    """So much of the prompt is computed."""

    computed_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """Text and tokens made since the last one; text may lag behind the tokens by what is held back."""

    text: str
    tokens: tuple[SampledToken, ...]
    index: int = 0  # of the answer
    stats: tuple[TokenStats, ...] = ()  # one for each token, if asked for


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds on the engine's monotonic clock; None where the moment was never reached."""

    queue: float | None
    prefill: float | None
    decode: float | None
    time_to_first_token: float | None
    gaps: tuple[float, ...] = ()  # between consecutive tokens
    predicted_time_to_first_token: float | None = None  # when it came in, by the cost model


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete."""

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int  # of the prompt
    output_tokens: int
    preemptions: int
    timings: Timings
    matched_stop: str | None = None
    matched_stop_token_id: int | None = None
    index: int = 0  # of the answer
    stats: RequestStats | None = None  # if asked for


@dataclass(frozen=True, slots=True)
class Failed:
    """The request, with all its answers, ends in an error status."""

    error: RequestError


Event = Progress | Delta | Finished | Failed


def nearest_rank(ordered: Sequence[float], share: float) -> float | None:
    """The smallest of sorted values that at least this share of them, above 0, does not exceed; None of none."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None
