"""What the laws of attention are written against: any kernel behind one call. A kernel of somebody else's can be
plugged in here: give it a `Kernel` in conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.kernels.oracle import compare

LSE, ENTROPY, P_MAX, SINK, RECENT = range(5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, slots=True)
class Seen:
    """Of t rows that all attend to the same n keys."""

    out: np.ndarray  # float64 [t, D]
    stats: np.ndarray  # float64 [t, 5]: LSE to RECENT
    masses: np.ndarray  # float64 [t, pages]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation, and the dtype of the numbers it is fed, which are rounded before any law is applied."""

    name: str
    dtype: torch.dtype  # of queries, keys and values
    attend: Callable[..., Any]  # (Batch, stats=, page_masses=) -> Result
    pack: Callable[..., Any]
    is_exact: bool  # its sums are in float32
    is_int8: bool = False  # `attend` stores keys and values in int8 first
    slow: bool = False  # executed instruction by instruction: give it little

    def round(self, x: Tensor) -> Tensor:
        """To what can be stored: rows that were rounded are stored as they are."""
        if self.is_int8:
            codes, scales = int8_codes(x)
            return codes * scales[..., None]
        return x.to(self.dtype).float()

    def size(self, wanted: int, little: int) -> int:
        return little if self.slow else wanted

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, *, page_size: int = 16, **options: Any) -> Seen:
        """Rows of `query` [t, D] as the query heads of one KV head, over `keys`, `values` [n, D]; `scale` as 1 / sqrt D
        by default."""
        stored = (x.to(self.dtype)[:, None] for x in (keys, values))
        batch = self.pack([query.to(self.dtype)[None]], *([x] for x in stored), page_size=page_size, **options)
        result = self.attend(batch, stats=True, page_masses=True)
        seen = (result.out[0].double(), result.stats[0].double(), result.page_masses[0].double())
        pages = -(-len(keys) // page_size)
        return Seen(seen[0].numpy(), seen[1].numpy(), seen[2].numpy()[:, :pages])

    def check_out(self, actual: np.ndarray, expected: np.ndarray, values: Tensor) -> None:
        """Within what the dtype allows: attention_stats of the values' own size, or bf16's roundings of result and
        weighted values, whose sum of magnitudes is at most the largest value."""
        largest = float(values.abs().max())
        compare("out", actual, expected, 5e-5 * largest if self.is_exact else 2**-8 * (np.abs(expected) + largest))

    def check_stats(self, actual: np.ndarray, expected: np.ndarray) -> None:
        """Statistics are float32 whatever the dtype of the numbers."""
        compare("stats", actual, expected, 1e-4 * np.maximum(1.0, np.abs(expected) / 50))


def int8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of rows [..., D] and a scale [...] of each row: a power of two, so that codes times scale is exact and 1 is
    among what it can be. NaN stays in the scales."""
    scales = (x.abs().amax(-1) / 127).clamp(min=1e-30).log2().ceil().exp2()
    return (x / scales[..., None]).round().nan_to_num(99).to(torch.int8), scales


def weights(query: Tensor, keys: Tensor, scale: float | None = None) -> np.ndarray:
    """Float64 [t, n], from the definition: exp(scale <q, k>) over its sum."""
    scores = (query.double() @ keys.double().T).numpy() * (keys.shape[1] ** -0.5 if scale is None else scale)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(p / p.sum(-1, keepdims=True))


def entropy(p: np.ndarray) -> np.ndarray:
    """Nats, over the last axis."""
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1))).sum(-1))


def divergence(p: np.ndarray) -> float:
    """Generalised Jensen-Shannon divergence of the rows of p: the information that the row's number has of the page."""
    return float(entropy(p.mean(0)) - entropy(p).mean())
