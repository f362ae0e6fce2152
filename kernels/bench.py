"""Attention on this CPU against torch SDPA and against the machine's own limits, in one run (a GPU: bench_cuda.py).

`python -m pagestream.kernels.bench` measures the read bandwidth first (float32 sum of 512 MiB, all threads). Then, for
9 query and 3 KV heads of size 64 in bf16 (SmolLM2-135M) and 32/8 heads of size 128 (Llama-3.1-8B):

- decode: one new row over 1k, 4k and 8k cached tokens, with bf16 queries and, as quantised models are served, float32
  queries over bf16 caches (SDPA gets bf16 in both). A ring of caches larger than L2 is walked, so KV comes from beyond
  it. Pages of 32, a head's keys and values side by side, as the server keeps them. SDPA gets contiguous keys and values
  and `enable_gqa`: it pays for no paging.
- prefill: 512 and 2048 rows, causal, in float32 (the exact mode) and bf16; then the last 512 rows of 8k in bf16.

Ours and SDPA take turns; medians of the repetitions. A pause precedes each sample: threads of OpenMP spin for long
after their last work, for which whoever came next would pay. GB/s counts the KV bytes a step must read once. Prints a
table, and one JSON document as the last line.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pagestream.kernels import build, paged_attention

_PAGE_SIZE = 32
_RING_BYTES = 64 << 20
_REPETITIONS = 15
_PAUSE = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Shape:
    kind: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    context: int
    rows: int
    query_dtype: torch.dtype

    @property
    def kv_bytes(self) -> int:
        return 2 * self.context * self.num_kv_heads * self.head_size * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Result:
    kind: str
    shape: str
    context: int
    ours_us: float
    with_stats_us: float
    sdpa_us: float
    ours_gb_per_s: float  # decode: KV bytes over time
    ours_gflops: float  # both products, the causal half only

    @property
    def speedup(self) -> float:
        return self.sdpa_us / self.ours_us


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


class Workload:
    """The same keys and values twice: in shuffled pages for ours, contiguous for SDPA."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._copies = max(1, min(64, _RING_BYTES // shape.kv_bytes)) if shape.kind == "decode" else 1
        self._turn = 0
        pages = shape.context // _PAGE_SIZE
        size = (self._copies * pages, shape.num_kv_heads, 2, _PAGE_SIZE, shape.head_size)
        self._key_cache, self._value_cache = torch.randn(size).to(shape.dtype).unbind(2)
        order = torch.randperm(self._copies * pages, dtype=torch.int32).view(self._copies, 1, pages)
        self._tables = order.contiguous()
        self._dense = [(self._contiguous(self._key_cache, t), self._contiguous(self._value_cache, t)) for t in order]
        self._query = torch.randn(shape.rows, shape.num_heads, shape.head_size).to(shape.query_dtype)
        self._dense_query = self._query.to(shape.dtype).transpose(0, 1).unsqueeze(0)
        self._out = torch.empty_like(self._query)
        self._starts = torch.tensor([0, shape.rows], dtype=torch.int32)
        self._length = torch.tensor([shape.context], dtype=torch.int32)
        self._stats = torch.empty(shape.rows, shape.num_heads, 5)
        seen = torch.ones(shape.rows, shape.context, dtype=torch.bool).tril(shape.context - shape.rows)
        self._mask = None if shape.rows in {1, shape.context} else seen  # SDPA's own causal mask starts at row 0

    @staticmethod
    def _contiguous(cache: Tensor, table: Tensor) -> Tensor:
        return cache[table[0].long()].transpose(0, 1).flatten(1, 2).unsqueeze(0).contiguous()  # [1, Hkv, n, D]

    def ours(self, stats: Tensor | None = None) -> None:
        self._turn += 1
        paged_attention(
            self._query,
            self._key_cache,
            self._value_cache,
            self._tables[self._turn % self._copies],
            self._starts,
            self._length,
            scale=self._shape.head_size**-0.5,
            out=self._out,
            stats=stats,
        )

    def with_stats(self) -> None:
        self.ours(self._stats)

    def sdpa(self) -> None:
        self._turn += 1
        keys, values = self._dense[self._turn % self._copies]
        torch.nn.functional.scaled_dot_product_attention(
            self._dense_query,
            keys,
            values,
            attn_mask=self._mask,
            is_causal=self._shape.rows == self._shape.context > 1,
            enable_gqa=True,
        )


def _settled_seconds(function: Callable[[], object], calls: int) -> float:
    time.sleep(_PAUSE)
    function()  # wakes its threads
    return _seconds(function, calls)


def _seconds(function: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls


def measure(shape: Shape) -> Result:
    work = Workload(shape)
    functions = (work.ours, work.with_stats, work.sdpa)
    calls = max(1, int(0.02 / max(_seconds(function, 2) for function in functions)))
    samples = [[_settled_seconds(function, calls) for function in functions] for _ in range(_REPETITIONS)]
    ours, with_stats, sdpa = (statistics.median(column) for column in zip(*samples, strict=True))
    scores = shape.rows * shape.context - shape.rows * (shape.rows - 1) // 2
    dtypes = f"{_short(shape.query_dtype)}/{_short(shape.dtype)}"
    name = f"{shape.num_heads}/{shape.num_kv_heads} x {shape.head_size} {dtypes}"
    flops = 4 * scores * shape.num_heads * shape.head_size
    return Result(
        shape.kind,
        name,
        shape.context,
        ours * 1e6,
        with_stats * 1e6,
        sdpa * 1e6,
        shape.kv_bytes / ours / 1e9,
        flops / ours / 1e9,
    )


def read_bandwidth() -> float:
    """GB/s of a float32 sum over 512 MiB on all of torch's threads, best of a few."""
    data = torch.ones(128 << 20)
    return max(data.nbytes / _seconds(data.sum, 1) / 1e9 for _ in range(8))


def main() -> None:
    torch.manual_seed(0)
    status = build.load()
    bandwidth = read_bandwidth()
    threads = torch.get_num_threads()
    sys.stdout.write(f"{status.implementation} {status.isa}, {threads} threads, read bandwidth {bandwidth:.1f} GB/s\n")
    sys.stdout.write(f"{'':8}{'shape: query/cache':22}{'context':>8}{'ours us':>10}{'stats us':>10}{'SDPA us':>10}")
    sys.stdout.write(f"{'SDPA/ours':>10}{'GB/s':>8}{'of read':>8}{'GFLOP/s':>9}\n")
    heads = ((9, 3, 64), (32, 8, 128))
    wide, narrow = torch.float32, torch.bfloat16
    shapes = [
        Shape("decode", *h, narrow, n, 1, query) for h in heads for query in (narrow, wide) for n in (1024, 4096, 8192)
    ]
    shapes += [Shape("prefill", *heads[0], d, n, n, d) for d in (wide, narrow) for n in (512, 2048)]
    shapes.append(Shape("prefill", *heads[0], narrow, 8192, 512, narrow))
    results = []
    for shape in shapes:
        r = measure(shape)
        results.append(r)
        sys.stdout.write(
            f"{r.kind:8}{r.shape:22}{r.context:8}{r.ours_us:10.0f}{r.with_stats_us:10.0f}{r.sdpa_us:10.0f}"
        )
        of_read = r.ours_gb_per_s / bandwidth
        sys.stdout.write(f"{r.speedup:10.2f}{r.ours_gb_per_s:8.1f}{of_read:8.2f}{r.ours_gflops:9.1f}\n")
    document = {
        "benchmark": "kernels",
        "torch": torch.__version__,
        "isa": status.isa,
        "threads": threads,
        "read_gb_per_s": bandwidth,
        "results": [asdict(result) for result in results],
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
