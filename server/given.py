"""Requests whose answer is given: how much of it a step scores, and what comes of it.

They are read like prompts, and behind what precedes a given token, that one is "chosen". Its log-probability is all
that is asked for. The prefix cache helps up to there.
"""

from __future__ import annotations

from collections.abc import Iterable

from pagestream.model.step import MAX_SCORED_ROWS, Chunk, SampledToken
from pagestream.server.request import Request


def room_to_score(planned: Iterable[Chunk]) -> int:
    """How many given tokens a step may score beside those of the chunks: what there is memory for."""
    return MAX_SCORED_ROWS - sum(len(chunk.sampled_positions) for chunk in planned if chunk.given)


def most_tokens(request: Request, length: int, planned: Iterable[Chunk]) -> int:
    """How many of its next `length` tokens a step may compute beside those chunks."""
    return min(length, max(request.num_reusable - request.num_computed, 0) + room_to_score(planned))


def collect(request: Request, chunk: Chunk, sampled: tuple[SampledToken, ...]) -> tuple[SampledToken, ...]:
    """Books what a step says of given tokens; returns it all when it is complete."""
    request.scores += sampled
    return tuple(request.scores) if chunk.samples else ()
