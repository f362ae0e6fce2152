"""From logits to tokens.

Order: logit bias, penalties, suppression before min_tokens; then temperature, top-k, top-p, min-p. Each filter is a
floor under which tokens are dropped, so tokens of equal weight stay or go together and the choice depends on nothing
but the values. One uniform number per token, a function of seed and position alone, is looked up in the cumulative
distribution over the vocabulary: a request draws the same tokens alone, in any batch and after preemption.

The vocabulary is not sorted and not summed token by token: both happen in blocks of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from pagestream.kernels.outputs import Outputs
from pagestream.model.step import Chunk, OutputStats, SampledToken, SamplingParams

BLOCK = 64  # tokens
NUCLEUS_WIDTH, NUCLEUS_GROWTH = 64, 8  # how many of the likeliest tokens top-p looks at, and how many times more next


class NonFiniteLogitsError(ArithmeticError):
    """The network returned NaN or infinity, or nothing is left to choose, for this request."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"{request_id}: no finite logits to choose a token from")
        self.request_id = request_id


class _Row(NamedTuple):
    """Of the logits: those of the token of `chunk` at `position`."""

    chunk: Chunk
    position: int

    @property
    def params(self) -> SamplingParams:
        return self.chunk.sampling


def sample(outputs: Outputs, chunks: Sequence[Chunk]) -> list[SampledToken]:
    """A token for each row of outputs [R, V], which are left as they are: chunk by chunk for each position at which it
    samples, from what is known or proposed before that position. Where an answer is given, its own token.

    Raises NonFiniteLogitsError for the first row whose largest logit is not finite.
    """
    rows = [_Row(chunk, position) for chunk in chunks for position in chunk.sampled_positions]
    if not rows:
        return []
    summary = outputs.summary.tolist()
    token_ids, largest = [int(row[0]) for row in summary], [row[1] for row in summary]
    adjusted = _adjust(outputs.logits, rows, token_ids, largest)
    for row, value in zip(rows, largest, strict=True):
        if not math.isfinite(value):
            raise NonFiniteLogitsError(row.chunk.request_id)
    surprisals: dict[int, float] = {}
    drawn = [index for index, row in enumerate(rows) if not _is_greedy(row.params)]
    if drawn:
        weights = filtered_weights(_take(adjusted, drawn), [rows[index].params for index in drawn])
        uniforms = [uniform(rows[index].params.seed, rows[index].position) for index in drawn]
        for index, token_id in zip(drawn, draw(weights, uniforms), strict=True):
            token_ids[index] = token_id
        if any(row.chunk.output_stats for row in rows):
            surprisals = dict(zip(drawn, _surprisals(weights, [token_ids[index] for index in drawn]), strict=True))
    for index, row in enumerate(rows):
        if row.chunk.given:
            token_ids[index] = row.chunk.given[row.position - row.chunk.first_chosen]
    return _report(outputs.logits, summary, rows, token_ids, surprisals)


def filtered_weights(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """What tokens [S, V] are drawn in proportion to: temperature (not 0), top-k, top-p, min-p of each row. The
    likeliest has weight 1, and what is filtered out 0; V is filled up with zeros to whole blocks.
    """
    weights = functional.pad(logits, (0, -logits.shape[-1] % BLOCK), value=-math.inf)
    weights -= logits.amax(dim=-1, keepdim=True)  # at most 0: no temperature overflows
    weights /= _column([p.temperature for p in params], logits)
    weights.exp_()
    floors = _column([p.min_p for p in params], weights)
    limits = _column([p.top_p for p in params], floors.double()) * _block_sums(weights).cumsum(dim=-1)[:, -1:]
    rows = [row for row, p in enumerate(params) if p.top_k is not None and p.top_k < logits.shape[-1]]
    if rows:  # top-p means a share of the k likeliest
        last = torch.tensor([params[row].top_k or 1 for row in rows], device=weights.device)[:, None] - 1
        likeliest = _largest(_take(weights, rows), int(last.max()) + 1)
        floors[rows] = floors[rows].maximum(likeliest.gather(1, last))
        shares = _column([params[row].top_p for row in rows], limits)
        limits[rows] = shares * likeliest.cumsum(dim=-1, dtype=torch.float64).gather(1, last)
    rows = [row for row, p in enumerate(params) if p.top_p < 1]
    if rows:
        floors[rows] = floors[rows].maximum(_nucleus_floors(_take(weights, rows), limits[rows]))
    return weights.masked_fill_(weights < floors, 0.0) if floors.any() else weights


def draw(weights: torch.Tensor, uniforms: Sequence[float]) -> list[int]:
    """Token ids [S]: the first whose cumulative weight exceeds the uniform share, in [0, 1), of the total. Looks for
    the block first. Sums in double precision, so that neither rounding nor the order of sums decides.
    """
    blocks = weights.view(len(weights), -1, BLOCK)
    up_to_block = functional.pad(_block_sums(weights).cumsum(dim=-1), (1, 0))  # and before the first
    targets = _column(uniforms, up_to_block) * up_to_block[:, -1:]
    chosen = torch.searchsorted(up_to_block, targets, right=True) - 1
    within = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    rest = targets - up_to_block.gather(1, chosen)
    last = within[:, -1:]
    rest = rest.minimum(last.nextafter(torch.zeros_like(last)))  # the two sums of a block may differ in the last bit
    return (chosen * BLOCK + torch.searchsorted(within, rest, right=True))[:, 0].tolist()


def uniform(seed: int, position: int) -> float:
    """In [0, 1): a hash of seed and position, so any position can be had without those before.

    52 bits, so that the product with the total of a distribution is always below that total.
    """
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 12) * 2.0**-52


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0 or params.top_k == 1


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _adjust(logits: torch.Tensor, rows: Sequence[_Row], token_ids: list[int], largest: list[float]) -> torch.Tensor:
    """Logits with each request's bias, penalties and suppression; a copy only if there are any. Corrects the likeliest
    tokens of such rows and their logits."""
    adjusted = logits
    for index, row in enumerate(rows):
        params = row.params
        num_output_tokens = row.position - row.chunk.num_prompt_tokens
        suppresses = num_output_tokens < params.min_tokens and params.suppressed_until_min_tokens
        penalises = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        if not (params.logit_bias or penalises or suppresses):
            continue
        if adjusted is logits:
            adjusted = logits.clone()
        scores = adjusted[index]
        if params.logit_bias:
            biased = torch.tensor(list(params.logit_bias), device=scores.device)
            scores[biased] += torch.tensor(list(params.logit_bias.values()), device=scores.device)
        if penalises:
            _penalise(scores, row)
        if suppresses:
            scores[list(params.suppressed_until_min_tokens)] = -math.inf
        value, token_id = scores.max(dim=-1)
        largest[index], token_ids[index] = value.item(), int(token_id)
    return adjusted


def _penalise(scores: torch.Tensor, row: _Row) -> None:
    """Repetition (CTRL, arXiv 1909.05858) over prompt and output; presence and frequency over the output, in place."""
    chunk, params = row.chunk, row.params
    tokens = torch.tensor(chunk.tokens_between(0, row.position), device=scores.device)
    if params.repetition_penalty != 1:
        seen = scores[tokens]
        penalty = params.repetition_penalty
        scores[tokens] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if params.presence_penalty or params.frequency_penalty:
        used, counts = torch.unique(tokens[chunk.num_prompt_tokens :], return_counts=True)
        scores[used] -= params.frequency_penalty * counts + params.presence_penalty


def _nucleus_floors(weights: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """The smallest weight of each row [S, 1] whose likelier tokens together have less than the limit."""
    floors = torch.empty_like(weights[:, :1])
    rows, width = list(range(len(weights))), NUCLEUS_WIDTH
    while rows:
        likeliest = _largest(_take(weights, rows), min(width, weights.shape[-1]))
        kept = likeliest.cumsum(dim=-1, dtype=torch.float64) - likeliest < limits[rows]
        floors[rows] = likeliest.gather(1, kept.sum(dim=-1, keepdim=True) - 1)
        unfinished = kept[:, -1].tolist() if width < weights.shape[-1] else ()
        rows = [row for row, is_unfinished in zip(rows, unfinished, strict=False) if is_unfinished]
        width *= NUCLEUS_GROWTH
    return floors


def _take(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These rows of it, in their order; all of it without a copy."""
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _block_sums(weights: torch.Tensor) -> torch.Tensor:
    return weights.view(len(weights), -1, BLOCK).sum(dim=-1).double()


def _largest(weights: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest weights of each row, falling: they lie in the `count` blocks with the largest maxima."""
    blocks = weights.view(len(weights), -1, BLOCK)
    if count < blocks.shape[1]:
        chosen = blocks.amax(dim=-1).topk(count, sorted=False).indices
        blocks = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK))
    return blocks.flatten(1).topk(count).values


def _surprisals(weights: torch.Tensor, token_ids: list[int]) -> list[float]:
    """Of the token of each row [S, V] under the distribution it was drawn from, nats."""
    chosen = weights.gather(1, torch.tensor(token_ids, device=weights.device)[:, None]).double()
    surprisals: list[float] = (_block_sums(weights).sum(dim=-1, keepdim=True) / chosen).log()[:, 0].tolist()
    return surprisals


def _report(
    logits: torch.Tensor,
    summary: Sequence[Sequence[float]],
    rows: Sequence[_Row],
    token_ids: list[int],
    sampling_surprisals: Mapping[int, float],
) -> list[SampledToken]:
    """Adds what is asked for of the model's own distribution: logprobs, statistics. A token that is missing in
    `sampling_surprisals` was certain."""
    result = [SampledToken(token_id) for token_id in token_ids]
    asked = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    if asked:
        logprobs = logits[asked].log_softmax(dim=-1)
        chosen = [float(values[token_ids[index]]) for index, values in zip(asked, logprobs, strict=True)]
        widths = [min(rows[index].params.logprobs or 0, logits.shape[-1]) for index in asked]
        top = logprobs.topk(max(widths), dim=-1)
        for index, logprob, width, ids, values in zip(
            asked, chosen, widths, top.indices.tolist(), top.values.tolist(), strict=True
        ):
            top_logprobs = tuple(zip(ids[:width], values[:width], strict=True))
            result[index] = SampledToken(token_ids[index], logprob, top_logprobs)
    for index, row in enumerate(rows):
        if row.chunk.output_stats:
            likeliest, largest, entropy, top1, margin = summary[index]
            token_id = token_ids[index]
            below = 0.0 if token_id == likeliest else largest - logits[index, token_id].item()
            surprisal = below - math.log(top1)
            output = OutputStats(entropy, top1, margin, surprisal, sampling_surprisals.get(index, 0.0))
            result[index] = SampledToken(token_id, result[index].logprob, result[index].top_logprobs, output)
    return result
