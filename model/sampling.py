"""From logits to tokens.

Order: logit bias, penalties, suppression before min_tokens; then temperature, top-k, top-p, min-p. Each filter is a
floor under which tokens are dropped, so tokens of equal logit stay or go together and the choice depends on nothing
but the values. One uniform number per token, a function of seed and position alone, is looked up in the cumulative
distribution over the vocabulary: a request draws the same tokens alone, in any batch and after preemption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pagestream.model.step import Chunk, SampledToken, SamplingParams

NUCLEUS_WIDTH = 1024  # how many of the likeliest tokens top-p looks at before it sorts the vocabulary: 6 times faster


class NonFiniteLogitsError(ArithmeticError):
    """The network returned NaN or infinity, or nothing is left to choose, for this request."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"{request_id}: no finite logits to choose a token from")
        self.request_id = request_id


def sample(logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[SampledToken]:
    """The next token of each chunk from its row of logits [S, V] fp32, which are left as they are.

    Raises NonFiniteLogitsError for the first row whose largest logit is not finite.
    """
    if not chunks:
        return []
    adjusted = _adjust(logits, chunks)
    largest, token_ids = adjusted.max(dim=-1)
    for chunk, is_finite in zip(chunks, largest.isfinite().tolist(), strict=True):
        if not is_finite:
            raise NonFiniteLogitsError(chunk.request_id)
    drawn = [row for row, chunk in enumerate(chunks) if not _is_greedy(chunk.sampling)]
    if drawn:
        params = [chunks[row].sampling for row in drawn]
        uniforms = [_uniform(chunks[row].sampling.seed, chunks[row].end) for row in drawn]
        token_ids[drawn] = _draw(filtered_probabilities(adjusted[drawn], params), uniforms)
    return _report(logits, chunks, token_ids)


def filtered_probabilities(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distribution [S, V] that tokens are drawn from: temperature (not 0), top-k, top-p, min-p of each row."""
    temperatures = _column([p.temperature for p in params], logits)
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures  # at most 0: no temperature overflows
    rows = [row for row, p in enumerate(params) if p.top_k is not None and p.top_k < scores.shape[-1]]
    if rows:
        scores[rows] = _keep_top_k(scores[rows], [params[row].top_k or 1 for row in rows])
    rows = [row for row, p in enumerate(params) if p.top_p < 1]
    if rows:
        scores[rows] = _keep_top_p(scores[rows], [params[row].top_p for row in rows])
    if any(p.min_p > 0 for p in params):
        floors = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]
        scores = scores.masked_fill(scores < _column(floors, scores), -math.inf)
    return scores.softmax(dim=-1)


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0 or params.top_k == 1


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _adjust(logits: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Logits with each request's bias, penalties and suppression; a copy only if there are any."""
    adjusted = logits
    for row, chunk in enumerate(chunks):
        params = chunk.sampling
        suppresses = chunk.end - chunk.num_prompt_tokens < params.min_tokens and params.suppressed_until_min_tokens
        penalises = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        if not (params.logit_bias or penalises or suppresses):
            continue
        if adjusted is logits:
            adjusted = logits.clone()
        scores = adjusted[row]
        if params.logit_bias:
            biased = torch.tensor(list(params.logit_bias), device=scores.device)
            scores[biased] += torch.tensor(list(params.logit_bias.values()), device=scores.device)
        if penalises:
            _penalise(scores, chunk)
        if suppresses:
            scores[list(params.suppressed_until_min_tokens)] = -math.inf
    return adjusted


def _penalise(scores: torch.Tensor, chunk: Chunk) -> None:
    """Repetition (CTRL, arXiv 1909.05858) over prompt and output; presence and frequency over the output, in place."""
    params = chunk.sampling
    tokens = torch.tensor(chunk.tokens[: chunk.end], device=scores.device)
    if params.repetition_penalty != 1:
        seen = scores[tokens]
        penalty = params.repetition_penalty
        scores[tokens] = torch.where(seen > 0, seen / penalty, seen * penalty)
    counts = torch.bincount(tokens[chunk.num_prompt_tokens :], minlength=len(scores))
    scores -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _keep_top_k(scores: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    likeliest = scores.topk(max(top_k), dim=-1).values
    floors = likeliest.gather(1, torch.tensor(top_k, device=scores.device)[:, None] - 1)
    return scores.masked_fill(scores < floors, -math.inf)


def _keep_top_p(scores: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """Keeps each token whose likelier tokens together have less than top_p."""
    probabilities = scores.softmax(dim=-1)
    limits = _column(top_p, scores)
    for width in (min(NUCLEUS_WIDTH, scores.shape[-1]), scores.shape[-1]):
        likeliest = probabilities.topk(width, dim=-1).values
        up_to_here = likeliest.cumsum(dim=-1, dtype=torch.float64)
        if (up_to_here[:, -1:] >= limits).all():
            break
    kept = up_to_here - likeliest < limits
    floors = likeliest.masked_fill(~kept, math.inf).amin(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < floors, -math.inf)


def _uniform(seed: int, position: int) -> float:
    """In [0, 1), from the counter-based generator Philox (Salmon et al., SC 2011): any position without those before.

    52 bits, so that the product with the total of a distribution is always below that total.
    """
    bits = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (bits >> 12) * 2.0**-52


def _draw(probabilities: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """Token ids [S]: the first whose cumulative probability exceeds the uniform share of the total."""
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    targets = _column(uniforms, cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def _report(logits: torch.Tensor, chunks: Sequence[Chunk], token_ids: torch.Tensor) -> list[SampledToken]:
    """Adds the logprobs asked for, of the model's own distribution."""
    result = [SampledToken(token_id) for token_id in token_ids.tolist()]
    rows = [row for row, chunk in enumerate(chunks) if chunk.sampling.logprobs is not None]
    if not rows:
        return result
    logprobs = logits[rows].log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[rows][:, None])[:, 0].tolist()
    widths = [min(chunks[row].sampling.logprobs or 0, logits.shape[-1]) for row in rows]
    top = logprobs.topk(max(widths), dim=-1)
    for row, logprob, width, ids, values in zip(
        rows, chosen, widths, top.indices.tolist(), top.values.tolist(), strict=True
    ):
        top_logprobs = tuple(zip(ids[:width], values[:width], strict=True))
        result[row] = SampledToken(result[row].token_id, logprob, top_logprobs)
    return result
