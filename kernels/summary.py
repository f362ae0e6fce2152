"""What is said of the attention of one row over all layers and heads, and how: the definitions, in plain PyTorch, which
are the oracle of csrc/observer.cpp and serve where `decoder.Decoder` does not.

p is a head's distribution over the n positions of the row's context, 0 where a window hides them. Position 0 gathers
mass that heads have no use for; what is called rest leaves it out and renormalises.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pagestream.kernels.checks import check_dense, check_device, check_dtype, check_shape
from pagestream.kernels.reference import RECENT_TOKENS, SINK_TOKENS, gather

BANDS = 16
LEAST_REST = 1e-3  # heads that leave less than this beside position 0 have no rest to speak of
# Of a layer group in `Observation.means`, in this order; then come the bands.
FIELDS = (
    "heads",
    "entropy",
    "entropy_min",
    "entropy_max",
    "sink",
    "recent",
    "p_max",
    "rest_heads",
    "entropy_rest",
    "log2_distance",
)
_MAX_GROUPS = 3


class Observation(NamedTuple):
    """Rows of a step to be observed, and room for what is found; on the CPU. O rows; N spans of their contexts; L
    layers in G groups, layer l in group l * G // L; P rows whose pages are asked for; M pages of a block table.
    """

    rows: Tensor  # int32 [O, 3]: a row of the batch (they increase), its sequence, its place in page_masses or -1
    spans: Tensor  # int32 [N, 3]: a place in rows (they do not decrease), first position, position behind the last
    means: Tensor  # float32 [O, G, FIELDS and BANDS]
    page_masses: Tensor  # float32 [P, L, Hq, 1 + M], zeros before: mass on position 0, then on each page
    span_shares: Tensor  # float32 [N, L, Hq, 2]: mass, and <o_span, o> / |o|^2 of the head's output o = sum p_j v_j

    def check(self, num_layers: int, num_heads: int, max_pages: int) -> None:
        """Raises ValueError for a wrong dtype, device, layout or shape."""
        named = list(self._asdict().items())
        check_dtype(torch.int32, *named[:2])
        check_dtype(torch.float32, *named[2:])
        check_device(torch.empty(0), *named)
        for name, tensor in named:
            check_dense((name, tensor), dims=tensor.dim(), dense=tensor.dim())
        check_shape(
            ("rows", self.rows, (len(self.rows), 3)),
            ("spans", self.spans, (len(self.spans), 3)),
            ("means", self.means, (len(self.rows), num_groups(num_layers), len(FIELDS) + BANDS)),
            ("page_masses", self.page_masses, (len(self.page_masses), num_layers, num_heads, 1 + max_pages)),
            ("span_shares", self.span_shares, (len(self.spans), num_layers, num_heads, 2)),
        )


def num_groups(num_layers: int) -> int:
    return min(num_layers, _MAX_GROUPS)


def layer_groups(num_layers: int) -> list[int]:
    """The group of each layer: early, middle and late third."""
    return [layer * num_groups(num_layers) // num_layers for layer in range(num_layers)]


def group_means(weights: Tensor) -> Tensor:
    """`weights` [L, Hq, n], p of one row, to [G, FIELDS and BANDS] of its dtype."""
    num_layers, _, n = weights.shape
    groups = torch.tensor(layer_groups(num_layers), device=weights.device)
    counts = torch.arange(n, 0, -1, device=weights.device)  # n - j
    bands = counts.log2().floor().long().clamp(max=BANDS - 1)
    means = []
    for group in range(num_groups(num_layers)):
        p = weights[groups == group].flatten(0, 1)  # [heads, n]
        entropy = torch.special.entr(p).sum(-1)
        rest = p[:, 1:].sum(-1)
        has_rest = rest > LEAST_REST
        rest_p = p[has_rest, 1:] / rest[has_rest, None]
        rest_heads = has_rest.sum()
        values = {
            "heads": p.new_tensor(len(p)),
            "entropy": entropy.mean(),
            "entropy_min": entropy.min(),
            "entropy_max": entropy.max(),
            "sink": p[:, :SINK_TOKENS].sum(-1).mean(),
            "recent": p[:, -RECENT_TOKENS:].sum(-1).mean(),
            "p_max": p.amax(-1).mean(),
            "rest_heads": rest_heads,
            "entropy_rest": torch.special.entr(rest_p).sum() / rest_heads.clamp(min=1),
            "log2_distance": (rest_p * counts[1:].log2()).sum() / rest_heads.clamp(min=1),
        }
        by_band = p.new_zeros(BANDS).index_add_(0, bands, p.mean(0))
        means.append(torch.cat([torch.stack([values[name].to(p.dtype) for name in FIELDS]), by_band]))
    return torch.stack(means)


def page_masses(weights: Tensor, page_size: int) -> Tensor:
    """`weights` [L, Hq, n] to [L, Hq, 1 + pages]: mass on position 0, then on each page."""
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % page_size))
    return torch.cat([weights[..., :1], torch.unflatten(padded, -1, (-1, page_size)).sum(-1)], -1)


def span_shares(weights: Tensor, values: Tensor, begin: int, end: int) -> Tensor:
    """`weights` [Hq, n] and `values` [Hq, n, D] to [Hq, 2]: mass on the span, its share of the head's output."""
    out = (weights[:, None] @ values)[:, 0]  # [Hq, D]
    of_span = (weights[:, None, begin:end] @ values[:, begin:end])[:, 0]
    square = (out * out).sum(-1)
    share = (of_span * out).sum(-1) / square.where(square > 0, 1)
    return torch.stack([weights[:, begin:end].sum(-1), share], -1)


class Observer:
    """Fills an observation layer by layer, from the queries and the caches that attention reads, on any device.

    `block_tables`, `query_starts`, `context_lengths` as `paged_attention` takes them. Lengths are read back.
    """

    def __init__(
        self, observation: Observation, block_tables: Tensor, query_starts: Tensor, context_lengths: Tensor
    ) -> None:
        self._observation = observation
        self._rows: list[tuple[int, int, int]] = observation.rows.tolist()
        self._spans: list[tuple[int, int, int]] = observation.spans.tolist()
        ends, lengths = query_starts.tolist()[1:], context_lengths.tolist()
        self._contexts = [lengths[sequence] - ends[sequence] + row + 1 for row, sequence, _ in self._rows]
        self._block_tables = block_tables
        self._weights: list[list[Tensor]] = [[] for _ in self._rows]  # of each layer [Hq, n]
        self._page_size = 0

    def add_layer(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        scale: float,
        window: int = 0,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> None:
        """The next layer's, after its keys and values are stored; shapes as `paged_attention` takes them."""
        self._page_size = key_cache.shape[2]
        num_heads = query.shape[1]
        layer = len(self._weights[0])
        for place, ((row, sequence, _), n) in enumerate(zip(self._rows, self._contexts, strict=True)):
            pages = self._block_tables[sequence, : -(-n // self._page_size)].long()
            keys = gather(key_cache, key_scales, pages, n, num_heads)
            scores = (keys @ query[row].float()[:, :, None])[..., 0] * scale  # [Hq, n]
            if window > 0:
                scores[:, : max(n - window, 0)] = -torch.inf
            weights = scores.softmax(-1)
            self._weights[place].append(weights)
            spans = [(index, begin, end) for index, (of, begin, end) in enumerate(self._spans) if of == place]
            if spans:
                values = gather(value_cache, value_scales, pages, n, num_heads)
            for index, begin, end in spans:
                self._observation.span_shares[index, layer] = span_shares(weights, values, begin, end)

    def finish(self) -> None:
        """After the last layer."""
        for place, (_, _, pages) in enumerate(self._rows):
            weights = torch.stack(self._weights[place])
            self._observation.means[place] = group_means(weights)
            if pages >= 0:
                masses = page_masses(weights, self._page_size)
                self._observation.page_masses[pages, :, :, : masses.shape[-1]] = masses
