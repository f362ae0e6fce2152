"""Attention statistics of one row in float64, from the formulas and nothing of ours."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def shares(query: Array, keys: Array, window: int | None) -> Array:
    """P [Hq, n] of a query [Hq, D] over keys [Hkv, n, D]."""
    num_heads, size = query.shape
    per_head = np.repeat(keys, num_heads // len(keys), axis=0)
    scores = np.einsum("hd,hnd->hn", query, per_head) / math.sqrt(size)
    if window is not None:
        scores[:, : max(scores.shape[1] - window, 0)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = weights / weights.sum(-1, keepdims=True)
    return result


def entropy(p: Array) -> float:
    return float(-sum(x * math.log(x) for x in p if x > 0))


def group(layers: list[Array]) -> dict[str, float]:
    """Of the p of some layers."""
    heads = [p for layer in layers for p in layer]
    rests = [p[1:] / p[1:].sum() for p in heads if p[1:].sum() > 1e-3]
    n = len(heads[0])
    log2_counts = np.log2(n - np.arange(1, n))
    return {
        "heads": len(heads),
        "entropy": float(np.mean([entropy(p) for p in heads])),
        "entropy_min": min(entropy(p) for p in heads),
        "entropy_max": max(entropy(p) for p in heads),
        "sink_mass": float(np.mean([p[:4].sum() for p in heads])),
        "recent_mass": float(np.mean([p[max(n - 64, 0) :].sum() for p in heads])),
        "p_max": float(np.mean([p.max() for p in heads])),
        "rest_heads": len(rests),
        "entropy_rest": float(np.mean([entropy(p) for p in rests])) if rests else 0.0,
        "log2_distance": float(np.mean([(p * log2_counts).sum() for p in rests])) if rests else 0.0,
    }


def bands(layers: list[Array]) -> Array:
    heads = np.concatenate(layers)
    distance = heads.shape[1] - 1 - np.arange(heads.shape[1])
    edges = [(2**b - 1, 2 ** (b + 1) - 1 if b < 15 else np.inf) for b in range(16)]
    return np.array([heads[:, (distance >= low) & (distance < high)].sum(-1).mean() for low, high in edges])


def span(layers: list[Array], values: Array, begin: int, end: int) -> dict[str, float]:
    """`values` [L, Hkv, n, D]."""
    masses, contributions, firsts = [], [], []
    for layer, of_layer in zip(layers, values, strict=True):
        for head, p in enumerate(layer):
            v = of_layer[head * len(of_layer) // len(layer)]
            out = p @ v
            masses.append(p[begin:end].sum())
            firsts.append(p[0])
            contributions.append(p[begin:end] @ v[begin:end] @ out / (out @ out))
    without = np.array(masses) - (np.array(firsts) if begin == 0 else 0)
    rest = 1 - np.array(firsts)
    return {
        "mass": float(np.mean(masses)),
        "mass_without_sink": float(without.sum() / rest.sum()) if rest.sum() > 1e-6 else 0.0,
        "contribution": float(np.mean(contributions)),
        "max_head_mass": float(max(masses)),
        "uniform": float(
            np.mean([np.count_nonzero(p[begin:end]) / np.count_nonzero(p) for p in np.concatenate(layers)])
        ),
    }


def divergence(members: Array, blocks_of: int) -> tuple[float, float]:
    """Jensen-Shannon divergence and coherence of [members, n] in blocks of so many."""
    starts = range(0, members.shape[1], blocks_of)
    blocks = np.array([[p[start : start + blocks_of].sum() for start in starts] for p in members.astype(float)])
    blocks /= blocks.sum(-1, keepdims=True)
    jsd = entropy(blocks.mean(0)) - float(np.mean([entropy(p) for p in blocks]))
    return jsd, 1 - jsd / math.log(min(blocks.shape))


def agreement(layers: list[Array], sizes: list[int]) -> Array:
    """Divergence and coherence of heads, a mean over layers, and those of layers, without the first token: means over
    blocks of these sizes."""
    rests = [p * (np.arange(p.shape[1]) > 0) for p in layers]
    rests = [p[p.sum(-1) > 1e-3] / p[p.sum(-1) > 1e-3].sum(-1, keepdims=True) for p in rests]
    means = np.array([p.mean(0) for p in rests])
    found = [(*np.mean([divergence(p, size) for p in rests], axis=0), *divergence(means, size)) for size in sizes]
    return np.array(np.mean(found, axis=0))
