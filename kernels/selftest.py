"""Mathematics that attention must obey, checked within a tenth of a second on the device, dtypes and pages that serve.

A wrong kernel, driver or memory shows here before it shows in answers. Nothing is compared with another kernel: the
yardstick is float64 of the same numbers, or arithmetic alone.

T1: attention is kernel regression, sum of K(q, k_j) v_j / sum of K(q, k_j), with K = exp(scale <q, k>).
T7: each channel of it lies between the least and the largest value, and values of 1 give 1.
T13: for independent normal queries and n keys, the entropy is log n - 1/2 in the mean, within 0.05 nats.
T19: what is attended to can be cut anywhere, here at pages, and merges by the parts' log-sum-exps to the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pagestream.kernels.append import append_kv
from pagestream.kernels.operators import paged_attention

TESTS = ("T1", "T7", "T13", "T19")

_ROWS, _CONTEXT = 4, 333  # tokens; no whole number of pages
_NULL_ROWS, _NULL_CONTEXT = 64, 8192
_EXACT = 5e-5  # of what float32 sums to, relative to the largest value
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.int8: 2.0**-8}  # of results and weights
_STORING = 1 / 200  # of keys and values, relative to the largest of a row: more than any dtype rounds


@dataclass(frozen=True, slots=True)
class Check:
    """One test's worst error as a share of what is allowed."""

    test: str
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= 1  # NaN is not


@dataclass(frozen=True, slots=True)
class Setting:
    """What will serve: dtypes of queries and of pages, how many query heads share a key, tokens of a page."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    group: int
    head_size: int
    page_size: int


@torch.inference_mode()
def run(setting: Setting) -> list[Check]:
    """Each of TESTS, in that order."""
    generator = torch.Generator(setting.device).manual_seed(0)
    query = 2 * _normal(setting, generator, _ROWS, setting.group)  # 2: weights far from uniform
    pages = _Pages(setting, *(_normal(setting, generator, _CONTEXT, 1) for _ in range(2)))
    ones = _Pages(setting, *(torch.ones(_CONTEXT, 1, setting.head_size).to(query) for _ in range(2)))
    whole, stats = pages.attend(query, [(0, _CONTEXT)])
    sums, _ = ones.attend(query, [(0, _CONTEXT)])
    weights = (query.double() @ pages.keys.T * setting.head_size**-0.5).softmax(-1)  # [rows, heads, n]
    expected, spread = weights @ pages.values, weights @ pages.values.abs()
    rounding = max(_ROUNDING.get(dtype, 0.0) for dtype in (setting.dtype, setting.kv_dtype))
    largest = pages.values.abs().max()
    allowed = _EXACT * largest + rounding * (expected.abs() + spread)
    outside = torch.maximum(pages.values.amin(0) - whole[0], whole[0] - pages.values.amax(0)).clamp(min=0) / largest
    return [
        Check("T1", max(_worst((whole[0] - expected) / allowed), pages.storage_error)),
        Check("T7", max(_worst(sums - 1), _worst(outside)) / (_EXACT + rounding)),
        Check("T13", _null_error(setting, generator)),
        Check("T19", _split_error(pages, query, whole[0], stats[0, ..., 0], allowed)),
    ]


def _null_error(setting: Setting, generator: torch.Generator) -> float:
    pages = _Pages(setting, *(_normal(setting, generator, _NULL_CONTEXT, 1) for _ in range(2)))
    query = _normal(setting, generator, -(-_NULL_ROWS // setting.group), setting.group)
    _, stats = pages.attend(query, [(0, _NULL_CONTEXT)])
    return abs(float(stats[..., 1].mean()) - (math.log(_NULL_CONTEXT) - 0.5)) / 0.05


def _split_error(pages: _Pages, query: Tensor, whole: Tensor, log_sum: Tensor, allowed: Tensor) -> float:
    """Of each page alone, and of two uneven parts, merged."""
    cuts = [*range(0, _CONTEXT, pages.page_size), _CONTEXT], [0, 2 * pages.page_size, _CONTEXT]
    splits = [list(pairwise(cut)) for cut in cuts]
    out, stats = pages.attend(query, [part for split in splits for part in split])
    errors = []
    for split in (slice(len(splits[0])), slice(len(splits[0]), None)):
        logs = stats[split, ..., 0]  # [parts, rows, heads]
        merged = logs.logsumexp(0)
        error = ((logs - merged).exp()[..., None] * out[split]).sum(0) - whole
        errors += [_worst(error / (2 * allowed)), _worst((merged - log_sum) / 1e-4)]
    return max(errors)


class _Pages:
    """Keys and values [n, 1, D] in shuffled pages. From then on, `keys` and `values` float64 [n, D] are what is stored,
    and `storage_error` how far that is from what was to be, as a share of what rounding allows.
    """

    def __init__(self, setting: Setting, keys: Tensor, values: Tensor) -> None:
        self.page_size = setting.page_size
        count = -(-len(keys) // self.page_size)
        self._table = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(keys.device)
        shape = (count, 1, 2, self.page_size)
        rows = torch.zeros(*shape, setting.head_size, dtype=setting.kv_dtype, device=keys.device)
        scales = torch.zeros(shape, device=keys.device)
        self._caches = rows[:, :, 0], rows[:, :, 1]
        scaled = setting.kv_dtype == torch.int8
        self._scales = (scales[:, :, 0], scales[:, :, 1]) if scaled else (None, None)
        slots = (self._table[:, None] * self.page_size + torch.arange(self.page_size, device=keys.device)).flatten()
        heads = torch.cat((torch.zeros_like(keys), keys, values), 1)
        cos = torch.ones(len(keys), setting.head_size, device=keys.device)  # positions 0: nothing is rotated
        key_scales, value_scales = self._scales
        append_kv(
            heads,
            cos,
            torch.zeros_like(cos),
            *self._caches,
            slots[: len(keys)],
            key_scales=key_scales,
            value_scales=value_scales,
        )
        meant = rows.double() * scales[..., None] if scaled else rows.double()
        stored = meant[self._table, 0].transpose(0, 1).flatten(1, 2)[:, : len(keys)]  # [2, n, D]
        self.keys, self.values = stored
        wanted = torch.stack([keys[:, 0], values[:, 0]]).double()
        self.storage_error = _worst((stored - wanted) / (_STORING * wanted.abs().amax(-1, keepdim=True)))

    def attend(self, query: Tensor, ranges: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Output [ranges, rows, heads, D] and statistics [ranges, rows, heads, 5], float64, of each row of a query
        [rows, heads, D] over each range of positions, which begins at a page."""
        rows, lengths = len(query), [end - begin for begin, end in ranges]
        tables = self._table.new_zeros(len(ranges), -(-max(lengths) // self.page_size))
        for table, (begin, end) in zip(tables, ranges, strict=True):
            pages = self._table[begin // self.page_size : -(-end // self.page_size)]
            table[: len(pages)] = pages
        repeated = query.repeat(len(ranges), 1, 1)
        out, stats = torch.empty_like(repeated), repeated.new_empty(*repeated.shape[:2], 5, dtype=torch.float32)
        paged_attention(
            repeated,
            *self._caches,
            tables.repeat_interleave(rows, 0).int(),
            torch.arange(len(repeated) + 1, dtype=torch.int32, device=query.device),
            torch.tensor(lengths, dtype=torch.int32, device=query.device).repeat_interleave(rows),
            scale=query.shape[2] ** -0.5,
            out=out,
            stats=stats,
            key_scales=self._scales[0],
            value_scales=self._scales[1],
        )
        shape = (len(ranges), rows, query.shape[1], -1)
        return out.double().view(shape), stats.double().view(shape)


def _normal(setting: Setting, generator: torch.Generator, rows: int, heads: int) -> Tensor:
    shape = (rows, heads, setting.head_size)
    return torch.randn(shape, generator=generator, device=setting.device).to(setting.dtype)


def _worst(errors: Tensor) -> float:
    """The largest absolute value; infinite if there is a NaN."""
    return float(errors.abs().nan_to_num(nan=math.inf).max())
