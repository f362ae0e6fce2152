"""Attention on this GPU against the device's own limits and against what else is installed, in one run.

`python -m pagestream.kernels.bench_cuda` measures two ceilings first: a device-to-device copy of 1 GiB (bytes read plus
written) and a float32 sum over 2 GiB (bytes read). Then, for 32 query and 8 KV heads of size 128:

- decode: one new row per sequence; contexts 1k to 128k, batch 1, 8, 64, lengths equal or Zipf (the i-th longest is
  1 / i of the longest, same total), pages of 64 and 16, bf16 and e4m3, statistics off, per head, per page;
- prefill: 2,048 rows at the end of 8k tokens.

Each case is a CUDA graph: one plan, then one call per copy of the cache, with as many copies as exceed twice L2, in
random pages. Time per call: median of 50 replays by events. Peers are those of bench_cuda_peers.py. Prints one JSON
line per case and a summary with fixed cost and slope (time = t0 + bytes / bandwidth, least squares over batch 1 from 4k
on).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from pagestream.kernels import attention_workspace, paged_attention, plan_attention
from pagestream.kernels.bench_cuda_peers import Problem, Step, peers

_HEADS, _KV_HEADS, _HEAD_SIZE = 32, 8, 128
_REPLAYS = 50
_COLD_BYTES = 256 << 20  # twice the L2 cache of an H200
_MAX_CACHE_BYTES = 24 << 30
_KI = 1024


@dataclass(frozen=True, slots=True)
class Case:
    kind: str = "decode"
    batch: int = 1
    context: int = 8 * _KI  # the mean over the batch
    rows: int = 1
    zipf: bool = False
    page_size: int = 64
    cache: str = "bfloat16"
    stats: str = "off"  # off, heads, pages

    def lengths(self) -> list[int]:
        if not self.zipf:
            return [self.context] * self.batch
        shares = [1 / rank for rank in range(1, self.batch + 1)]
        total = self.batch * self.context
        return [max(1, round(total * share / sum(shares))) for share in shares]

    def kv_bytes(self) -> int:
        itemsize = getattr(torch, self.cache).itemsize
        return int(2 * sum(self.lengths()) * _KV_HEADS * _HEAD_SIZE * itemsize)

    def flops(self) -> int:
        """Of both products, over the causal scores alone."""
        scores = sum(self.rows * n - self.rows * (self.rows - 1) // 2 for n in self.lengths())
        return 4 * scores * _HEADS * _HEAD_SIZE


def cases() -> Iterator[Case]:
    for batch in (1, 8, 64):
        for context in (1, 4, 8, 16, 32, 128):
            yield Case(batch=batch, context=context * _KI)
    for context in (1, 8):
        yield Case(batch=64, context=context * _KI, zipf=True)
    for batch, context in ((1, 32), (8, 1), (8, 8), (8, 32)):
        for stats in ("heads", "pages"):
            yield Case(batch=batch, context=context * _KI, stats=stats)
        yield Case(batch=batch, context=context * _KI, page_size=16)
    for batch, context in ((1, 1), (1, 8), (1, 32), (8, 8), (8, 32)):
        yield Case(batch=batch, context=context * _KI, cache="float8_e4m3fn")
    yield Case("prefill", rows=2048)


class Workload:
    """The caches of a case, several times over, and calls that walk through them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        lengths = case.lengths()
        self.copies = max(1, -(-_COLD_BYTES // case.kv_bytes()))
        counts = [-(-n // case.page_size) for n in lengths]
        pages = self.copies * sum(counts)
        shape = (pages, _KV_HEADS, 2, case.page_size, _HEAD_SIZE)
        storage = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_().to(getattr(torch, case.cache))
        self.key_cache, self.value_cache = storage[:, :, 0], storage[:, :, 1]
        order = torch.randperm(pages, dtype=torch.int32, device="cuda")
        tables = torch.nn.utils.rnn.pad_sequence(list(torch.split(order, counts * self.copies)), batch_first=True)
        self.tables = tables.view(self.copies, case.batch, -1)
        self.query = torch.randn(case.batch * case.rows, _HEADS, _HEAD_SIZE, dtype=torch.bfloat16, device="cuda")
        self.out = torch.empty_like(self.query)
        starts = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda")
        self.starts, self.lengths = starts * case.rows, torch.tensor(lengths, dtype=torch.int32, device="cuda")
        rows = (case.batch * case.rows, _HEADS)
        self.stats = None if case.stats == "off" else torch.empty(*rows, 5, device="cuda")
        self.page_masses = torch.empty(*rows, tables.shape[1], device="cuda") if case.stats == "pages" else None
        self.workspace = attention_workspace(self.query, page_masses=self.page_masses, page_size=case.page_size)

    def step(self) -> None:
        """One plan and a call per copy, as the layers of a step."""
        sizes = {"num_heads": _HEADS, "num_kv_heads": _KV_HEADS, "head_size": _HEAD_SIZE}
        plan_attention(self.starts, self.lengths, **sizes, workspace=self.workspace)
        for tables in self.tables:
            paged_attention(
                self.query,
                self.key_cache,
                self.value_cache,
                tables,
                self.starts,
                self.lengths,
                scale=_HEAD_SIZE**-0.5,
                out=self.out,
                stats=self.stats,
                page_masses=self.page_masses,
                workspace=self.workspace,
            )


def peers_of(work: Workload) -> dict[str, Callable[[], Step]]:
    """Of equal lengths, in bf16, without statistics."""
    case = work.case
    if case.zipf or case.stats != "off" or case.cache != "bfloat16" or case.page_size != 64:
        return {}
    query = work.query.view(case.batch, case.rows, _HEADS, _HEAD_SIZE)
    return peers(Problem(query, work.key_cache, work.value_cache, work.tables, case.context))


def replay_us(step: Callable[[], object]) -> float:
    """Microseconds of one step, captured in a graph."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return median_us(graph.replay)


def median_us(function: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(_REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def ceilings() -> tuple[float, float]:
    """GB/s of a copy and of a read."""
    source = torch.randn(512 << 20, device="cuda")
    target = torch.empty(256 << 20, device="cuda")
    copy = 2 * target.nbytes / median_us(lambda: target.copy_(source[: 256 << 20])) / 1e3
    read = source.nbytes / median_us(source.sum) / 1e3
    return copy, read


def measure(case: Case, copy: float, read: float) -> dict[str, object]:
    work = Workload(case)
    us = replay_us(work.step) / work.copies
    gb_per_s = case.kv_bytes() / us / 1e3
    line = {**asdict(case), "copies": work.copies, "us": us, "gb_per_s": gb_per_s, "of_copy": gb_per_s / copy}
    line |= {"of_read": gb_per_s / read, "tflops": case.flops() / us / 1e6}
    for name, make_step in peers_of(work).items():
        try:
            line[f"{name}_us"] = replay_us(make_step()) / work.copies
        except Exception as error:  # noqa: BLE001 - out of memory, or what a peer refuses in its own way: said in the result
            line[f"{name}_error"] = str(error)[:200]
    times = [float(str(value)) for name, value in line.items() if name.endswith("_us")]
    return line | {"best_peer_over_ours": min(times) / us} if times else line


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares of microseconds over bytes: t0 in us, slope as GB/s."""
    count, bytes_sum, us_sum = len(points), sum(b for b, _ in points), sum(t for _, t in points)
    squares, products = sum(b * b for b, _ in points), sum(b * t for b, t in points)
    slope = (count * products - bytes_sum * us_sum) / (count * squares - bytes_sum**2)
    return (us_sum - slope * bytes_sum) / count, 1e-3 / slope


def main() -> None:
    if not torch.cuda.is_available():
        sys.stderr.write("no CUDA device here\n")
        sys.exit(2)
    torch.manual_seed(0)
    copy, read = ceilings()
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_per_s": copy}
    device["read_gb_per_s"] = read
    sys.stdout.write(json.dumps({"benchmark": "cuda_ceilings", **device}) + "\n")
    points: dict[str, list[tuple[float, float]]] = {"bfloat16": [], "float8_e4m3fn": []}
    for case in cases():
        if case.kv_bytes() > _MAX_CACHE_BYTES:
            continue
        torch.cuda.empty_cache()
        line = measure(case, copy, read)
        sys.stdout.write(json.dumps({"benchmark": "cuda_attention", **line}) + "\n")
        sys.stdout.flush()
        if case == Case(batch=1, context=case.context, cache=case.cache) and case.context >= 4 * _KI:
            points[case.cache].append((case.kv_bytes(), float(str(line["us"]))))
    fits = {name: dict(zip(("t0_us", "gb_per_s"), fit(p), strict=True)) for name, p in points.items() if len(p) > 1}
    sys.stdout.write(json.dumps({"benchmark": "cuda_attention_fit", **device, "fits": fits}) + "\n")


if __name__ == "__main__":
    main()
