"""The float64 oracle of attention, and a comparison that names the worst element."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

STATS = ("lse", "entropy", "p_max", "sink", "recent")


def oracle(batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Float64 from the definitions, with whole score matrices: out, stats, page masses, and sum of p_j |v_j| (what the
    rounding of bf16 values scales with)."""
    tokens, heads, head_size = batch.query.shape
    max_pages, page_size = batch.block_tables.shape[1], batch.key_cache.shape[2]
    out, spread = np.zeros((2, tokens, heads, head_size))
    stats, masses = np.zeros((tokens, heads, 5)), np.zeros((tokens, heads, max_pages))
    starts = batch.query_starts.tolist()
    for s, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
        if starts[s] == starts[s + 1]:
            continue
        rows, key = slice(starts[s], starts[s + 1]), np.arange(len(keys))
        position = len(keys) - starts[s + 1] + np.arange(rows.start, rows.stop)[:, None]
        seen = (key <= position) & (key > position - (batch.window or len(keys)))
        for h in range(heads):
            k, v = (x[:, h * keys.shape[1] // heads].double().numpy() for x in (keys, values))
            scores = np.where(seen, batch.scale * batch.query[rows, h].double().numpy() @ k.T, -np.inf)
            top = scores.max(-1, keepdims=True)
            lse = top + np.log(np.exp(scores - top).sum(-1, keepdims=True))
            p = np.exp(scores - lse)
            entropy = -(p * np.where(seen, scores - lse, 0)).sum(-1)
            sums = (p[:, :4].sum(-1), (p * (key > position - 64)).sum(-1))
            out[rows, h], spread[rows, h] = p @ v, p @ np.abs(v)
            stats[rows, h] = np.stack([lse[:, 0], entropy, p.max(-1), *sums], -1)
            np.add.at(masses[rows, h].T, key // page_size, p.T)
    return out, stats, masses, spread


def compare(name: str, actual: object, expected: object, tolerance: object) -> None:
    """Fail naming the worst element; a NaN or infinity that is not in the same place on both sides is an error."""
    a, e = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert a.shape == e.shape, f"{name}: shape {a.shape}, expected {e.shape}"
    misplaced = (np.isnan(a) != np.isnan(e)) | ((np.isinf(a) | np.isinf(e)) & (a != e))
    misplaced &= ~(np.isnan(a) & np.isnan(e))
    if misplaced.any():
        at = tuple(int(i) for i in np.argwhere(misplaced)[0])
        raise AssertionError(f"{name}{list(at)}: {a[at]}, expected {e[at]} ({misplaced.sum()} misplaced NaN or inf)")
    finite = np.isfinite(e)
    with np.errstate(invalid="ignore"):  # inf - inf, where nothing is compared
        excess = np.where(finite, np.abs(a - e) - tolerance, -np.inf)  # type: ignore[operator]
    if excess.size and excess.max() > 0:
        at = tuple(int(i) for i in np.unravel_index(excess.argmax(), excess.shape))
        allowed = np.broadcast_to(np.asarray(tolerance), e.shape)[at]
        raise AssertionError(
            f"{name}{list(at)}: {a[at]}, expected {e[at]} within {allowed:.3g} ({(excess > 0).sum()} bad)"
        )


def check_against_oracle(batch: Any, result: Any) -> None:
    out, stats, masses, spread = oracle(batch)
    # Of results, and of weights beside such values.
    roundings = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.int8: 2.0**-8}
    rounding = max(roundings.get(tensor.dtype, 0.0) for tensor in (batch.query, batch.key_cache))
    largest_value = max(float(v.float().abs().max()) for v in batch.values if len(v))
    compare("out", result.out, out, 5e-6 * largest_value + rounding * (np.abs(out) + spread))
    largest_score = float(np.abs(stats[..., 0]).max(initial=0))
    assert result.stats is not None
    assert result.page_masses is not None
    for i, statistic in enumerate(STATS):
        compare(statistic, result.stats[..., i], stats[..., i], 2e-6 * max(5.0, largest_score))
    compare("page_masses", result.page_masses, masses, 2e-6 * max(5.0, largest_score))
