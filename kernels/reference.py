"""The operators in plain PyTorch, on any device: slow, obvious, the oracle of every other implementation.

Contracts in operators.py, definitions of the statistics in softmax.h. Lengths are read back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagestream.kernels import packing

SINK_TOKENS = 4
RECENT_TOKENS = 64
INT8_MAX = 127
LEAST_SCALED = 1e-36  # of smaller rows the inverse scale is no float32: they count as 0
_ROWS_AT_ONCE = 256  # bounds the score matrix


def store_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    page_size = key_cache.shape[2]
    pages, offsets = slots // page_size, slots % page_size
    for rows, cache, scales in ((key, key_cache, key_scales), (value, value_cache, value_scales)):
        if scales is not None:
            largest = rows.float().abs().amax(-1)
            scales[pages, :, offsets] = largest / INT8_MAX
            inverse = torch.where(largest >= LEAST_SCALED, torch.full_like(largest, INT8_MAX) / largest, 0)
            cache[pages, :, offsets] = (rows.float() * inverse[..., None]).round().nan_to_num(0).to(torch.int8)
            continue
        limit = (
            torch.finfo(cache.dtype).max if cache.dtype == torch.float8_e4m3fn else float("inf")
        )  # it has no infinity
        cache[pages, :, offsets] = rows.clamp(-limit, limit).to(cache.dtype)


def append_kv(
    heads: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    num_kv_heads, head_size = key_cache.shape[1], key_cache.shape[3]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    query_key = heads[:, :-num_kv_heads].float()
    if norm_weight is not None:
        query_key = torch.nn.functional.rms_norm(query_key, (head_size,), eps=epsilon) * norm_weight.float()
    swapped = query_key.roll(head_size // 2, -1)
    rotated = query_key * cos[:, None] + swapped * signed_sin[:, None]
    heads[:, :num_heads] = rotated[:, :num_heads].to(heads.dtype)
    key, value = rotated[:, num_heads:], heads[:, -num_kv_heads:]
    if key_cache.dtype == torch.int8:
        store_kv(key, value, key_cache, value_cache, slots, key_scales, value_scales)
    else:
        store_kv(_divide(key, key_scales), _divide(value, value_scales), key_cache, value_cache, slots)


def _divide(rows: Tensor, scales: Tensor | None) -> Tensor:
    return rows if scales is None else rows.float() / scales[:, None]


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    scale: float,
    window: int,
    out: Tensor,
    stats: Tensor | None,
    page_masses: Tensor | None,
    workspace: Tensor | None = None,  # noqa: ARG001  # kernels that split the keys need one
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    starts, lengths = query_starts.tolist(), context_lengths.tolist()
    num_heads, page_size = query.shape[1], key_cache.shape[2]
    for sequence, context in enumerate(lengths):
        begin, end = starts[sequence], starts[sequence + 1]
        pages = block_tables[sequence, : -(-context // page_size)].long()
        keys = gather(key_cache, key_scales, pages, context, num_heads)  # [Hq, n, D]
        values = gather(value_cache, value_scales, pages, context, num_heads)
        for row in range(begin, end, _ROWS_AT_ONCE):
            rows = slice(row, min(row + _ROWS_AT_ONCE, end))
            positions = torch.arange(rows.start, rows.stop, device=query.device) - end + context  # [t]
            scores = (query[rows].float().transpose(0, 1) @ keys.transpose(1, 2)) * scale  # [Hq, t, n]
            visible = _visible(positions, context, window)
            scores = scores.masked_fill(~visible, float("-inf"))
            weights = scores.softmax(-1)
            out[rows] = (weights @ values).transpose(0, 1).to(out.dtype)
            if stats is not None:
                stats[rows] = _statistics(scores, weights, positions, visible)
            if page_masses is not None:
                page_masses[rows] = _page_masses(weights, page_size, page_masses.shape[2])


def quantized_linear(
    input: Tensor,  # noqa: A002
    codes: Tensor,
    scales: Tensor,
    mins: Tensor | None,
    out: Tensor,
    _prefill_rows: int = 0,
) -> None:
    rows = torch.arange(out.shape[1], device=out.device)
    weight = packing.unpack_rows(codes, scales, mins, rows)  # float32 [N, K]
    out.copy_((packing.round_input(input.float()).double() @ weight.double().T).to(out.dtype))


def gather(cache: Tensor, scales: Tensor | None, pages: Tensor, context: int, num_heads: int) -> Tensor:
    """The first `context` slots of `pages`, one copy per query head: float32 `[Hq, context, D]`."""
    rows = cache[pages].float().transpose(0, 1).flatten(1, 2)[:, :context]
    if scales is not None and scales.dim() == 1:  # e4m3: per head
        rows = rows * scales[:, None, None]
    elif scales is not None:  # int8: per slot and head
        rows = rows * scales[pages].transpose(0, 1).flatten(1)[:, :context, None]
    return rows.repeat_interleave(num_heads // cache.shape[1], dim=0)


def _visible(positions: Tensor, context: int, window: int) -> Tensor:
    """Bool `[t, context]`: which keys each position attends to."""
    distance = positions[:, None] - torch.arange(context, device=positions.device)
    return (distance >= 0) & (distance < window) if window > 0 else distance >= 0


def _statistics(scores: Tensor, weights: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    """`[t, Hq, 5]`; masked scores are -inf and have weight 0."""
    shifted = scores - scores.amax(-1, keepdim=True)
    # ln l - u / l with l and u shifted by the maximum: log-sum-exp minus mean score loses digits on large scores.
    mean_shifted = (weights * shifted.masked_fill(~visible, 0)).sum(-1)
    entropy = shifted.exp().sum(-1).log() - mean_shifted
    recent = torch.arange(weights.shape[-1], device=weights.device) > positions[:, None] - RECENT_TOKENS
    parts = (
        scores.logsumexp(-1),
        entropy,
        weights.amax(-1),
        weights[..., :SINK_TOKENS].sum(-1),
        (weights * recent).sum(-1),
    )
    return torch.stack(parts, -1).transpose(0, 1)


def _page_masses(weights: Tensor, page_size: int, max_pages: int) -> Tensor:
    """`[t, Hq, max_pages]`."""
    missing = max_pages * page_size - weights.shape[-1]
    padded = torch.nn.functional.pad(weights, (0, missing))
    return padded.reshape(*padded.shape[:2], max_pages, page_size).sum(-1).transpose(0, 1)
