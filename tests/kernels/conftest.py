"""Random paged batches with poison wherever nothing may be read, a float64 oracle, a comparison that names the worst
element, and every implementation of the operator behind one call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pagestream.kernels import build, paged_attention, reference
from tests.kernels.host_gpu.program import HostGpu, running
from tests.kernels.laws import Kernel, int8_codes
from tests.kernels.oracle import check_against_oracle, compare

ISAS = ("amx", "avx512", "avx2", "baseline")


@dataclass
class Batch:
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    scale: float
    window: int
    keys: list[Tensor] = field(default_factory=list)  # per sequence [n, Hkv, D], as stored
    values: list[Tensor] = field(default_factory=list)
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclass
class Result:
    out: Tensor  # float32 [T, Hq, D]
    stats: Tensor | None  # [T, Hq, 5]
    page_masses: Tensor | None  # [T, Hq, M]


Attend = Callable[..., Result]


def pack(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    page_size: int = 64,
    scale: float | None = None,
    window: int = 0,
    seed: int = 0,
    query_dtype: torch.dtype | None = None,
) -> Batch:
    """Store `keys[s]`, `values[s]` `[n, Hkv, D]` in random pages; `queries[s]` `[t, Hq, D]` are the last t rows. Slots
    that belong to nobody hold NaN, unused entries of the block tables ids far outside the cache."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(k) for k in keys]
    counts = [-(-n // page_size) for n in lengths]
    dtype, (_, kv_heads, head_size) = keys[0].dtype, keys[0].shape
    num_pages = sum(counts) + 3
    # Keys and values of a page lie side by side, so page strides are not what the shapes suggest.
    storage = torch.full((num_pages, 2, kv_heads, page_size, head_size), float("nan"), dtype=dtype)
    key_cache, value_cache = storage[:, 0], storage[:, 1]
    tables = torch.where(torch.arange(max(counts) + 2) % 2 == 0, 2**31 - 1, -(2**31)).repeat(len(keys), 1).int()
    free = torch.randperm(num_pages, generator=generator).tolist()
    for s, count in enumerate(counts):
        for i in range(count):
            page, rows = free.pop(), slice(i * page_size, min((i + 1) * page_size, lengths[s]))
            tables[s, i] = page
            key_cache[page, :, : rows.stop - rows.start] = keys[s][rows].transpose(0, 1)
            value_cache[page, :, : rows.stop - rows.start] = values[s][rows].transpose(0, 1)
    query = torch.cat(list(queries)).to(query_dtype or dtype)
    fused = torch.full((len(query), query.shape[1] + 2, head_size), float("nan"), dtype=query.dtype)
    fused[:, :-2] = query  # a slice of fused projections: rows are not adjacent
    starts = np.cumsum([0, *(len(q) for q in queries)])
    return Batch(
        fused[:, :-2],
        key_cache,
        value_cache,
        tables,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        head_size**-0.5 if scale is None else scale,
        window,
        list(keys),
        list(values),
    )


def random_batch(
    rows: Sequence[tuple[int, int]],
    *,
    heads: tuple[int, int] = (6, 2),
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    seed: int = 0,
    **options: float,
) -> Batch:
    """`rows`: (new rows, cached tokens with them) per sequence; `heads`: query and KV heads."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    queries = [2 * normal(t, heads[0], head_size) for t, _ in rows]  # 2: weights far from uniform
    keys, values = ([normal(n, heads[1], head_size) for _, n in rows] for _ in range(2))
    return pack(queries, keys, values, seed=seed, query_dtype=query_dtype, **options)  # type: ignore[arg-type]


def int8_batch(rows: Sequence[tuple[int, int]], **options: Any) -> Batch:
    """A batch in int8 with a scale per slot and KV head, of which those of nobody's slots are NaN; the oracle sees what
    the stored numbers mean."""
    batch = random_batch(rows, **options)
    page_size = batch.key_cache.shape[2]

    def stored(cache: Tensor, originals: list[Tensor]) -> tuple[Tensor, Tensor]:
        scales = cache.abs().amax(-1) / 127
        codes = (cache / scales[..., None]).round().nan_to_num(99).to(torch.int8)
        for s, original in enumerate(originals):
            pages = batch.block_tables[s, : -(-len(original) // page_size)].long()
            meant = codes[pages] * scales[pages][..., None]
            originals[s] = meant.transpose(1, 2).flatten(0, 1)[: len(original)]
        return codes, scales

    batch.key_cache, batch.key_scales = stored(batch.key_cache, batch.keys)
    batch.value_cache, batch.value_scales = stored(batch.value_cache, batch.values)
    return batch


def float8_batch(
    rows: Sequence[tuple[int, int]], key_scale: float, value_scale: float, **options: Any
) -> tuple[Batch, tuple[Tensor, Tensor]]:
    """A batch in e4m3 and its scales, which differ from head to head; the oracle sees what the stored numbers mean."""
    batch = random_batch(rows, **{"dtype": torch.bfloat16, **options})
    page_size = batch.key_cache.shape[2]

    def stored(cache: Tensor, originals: list[Tensor], scale: Tensor) -> Tensor:
        rounded = (cache.float() / scale[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        for s, original in enumerate(originals):
            pages = batch.block_tables[s, : -(-len(original) // page_size)].long()
            meant = rounded[pages].float() * scale[:, None, None]
            originals[s] = meant.transpose(1, 2).flatten(0, 1)[: len(original)]
        return rounded

    kv_heads = batch.key_cache.shape[1]
    scales = (torch.linspace(1, 2, kv_heads) * key_scale, torch.linspace(1, 2, kv_heads) * value_scale)
    batch.key_cache = stored(batch.key_cache, batch.keys, scales[0])
    batch.value_cache = stored(batch.value_cache, batch.values, scales[1])
    return batch, scales


def run(batch: Batch, operator: Callable[..., None], device: str, *, stats: bool, page_masses: bool) -> Result:
    tensors = [
        t.to(device)
        for t in (
            batch.query,
            batch.key_cache,
            batch.value_cache,
            batch.block_tables,
            batch.query_starts,
            batch.context_lengths,
        )
    ]
    shape, pages = batch.query.shape, batch.block_tables.shape[1]
    out = torch.full_like(tensors[0].contiguous(), float("nan"))
    got_stats = torch.full((*shape[:2], 5), float("nan"), device=device) if stats else None
    masses = torch.full((*shape[:2], pages), float("nan"), device=device) if page_masses else None
    scales = {} if batch.key_scales is None else {"key_scales": batch.key_scales, "value_scales": batch.value_scales}
    operator(*tensors, scale=batch.scale, window=batch.window, out=out, stats=got_stats, page_masses=masses, **scales)
    return Result(
        out.cpu().float(),
        None if got_stats is None else got_stats.cpu(),
        None if masses is None else masses.cpu(),
    )


@contextmanager
def _implementation(name: str) -> Iterator[Attend]:
    """`attend(batch, stats=True, page_masses=True)`; skips the test where this machine cannot run it."""
    operator: Callable[..., None] = reference.paged_attention if name == "reference" else paged_attention

    def call(batch: Batch, *, stats: bool = True, page_masses: bool = True) -> Result:
        return run(batch, operator, "cuda" if name == "cuda" else "cpu", stats=stats, page_masses=page_masses)

    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with forced_or_skip(name) if name in ISAS else nullcontext():
        yield call


@pytest.fixture(params=["reference", *ISAS, pytest.param("cuda", marks=pytest.mark.gpu)])
def attend(request: pytest.FixtureRequest) -> Iterator[Attend]:
    """Each implementation that this machine can run."""
    with _implementation(request.param) as call:
        yield call


@pytest.fixture(params=ISAS)
def cpp_attend(request: pytest.FixtureRequest) -> Iterator[Attend]:
    """`attend` for the properties that only the C++ kernels promise."""
    with forced_or_skip(request.param):
        yield lambda batch, *, stats=True, page_masses=True: run(
            batch, paged_attention, "cpu", stats=stats, page_masses=page_masses
        )


class forced_or_skip:  # noqa: N801  # used as a context manager
    def __init__(self, isa: str) -> None:
        self._context = build.forced_isa(isa)

    def __enter__(self) -> None:
        try:
            self._context.__enter__()
        except ValueError as error:
            pytest.skip(str(error))

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)


@pytest.fixture(scope="session")
def host_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostGpu]:
    """The CUDA kernels' source, executed on this CPU."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "host_gpu"
    shared.mkdir(exist_ok=True)
    with running(shared) as machine:
        yield machine


_CPU = ("reference", *ISAS)
_EXACT = [
    *((name, torch.float32) for name in ("reference", "avx512", "avx2", "baseline", "cuda")),
    *((name, torch.int8) for name in ("reference", "avx512", "avx2", "baseline")),
]
_ROUNDED = [
    *((name, torch.bfloat16) for name in (*_CPU, "host-executed CUDA", "cuda")),
    ("amx", torch.int8),
]


def _cases(cases: list[tuple[str, torch.dtype]]) -> list[Any]:
    return [
        pytest.param(case, id=f"{case[0]}, {case[1]}", marks=pytest.mark.gpu if case[0] == "cuda" else ())
        for case in cases
    ]


@pytest.fixture(params=_cases(_EXACT + _ROUNDED))
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Every kernel that this machine can run, with each kind of numbers it treats in its own way."""
    name, dtype = request.param
    if name == "host-executed CUDA":
        machine: HostGpu = request.getfixturevalue("host_gpu")

        def attend(batch: Batch, *, stats: bool = True, page_masses: bool = True) -> Result:
            out, *others = machine.attend(batch, stats=stats, page_masses=page_masses)
            return Result(out.float(), *others)

        yield Kernel(name, dtype, attend, pack, is_exact=False, slow=True)
        return
    with _implementation(name) as attend_here:
        yield _kernel(name, dtype, attend_here)


@pytest.fixture(params=_cases(_EXACT))
def exact_kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """For laws about differences that roundings to bf16 would drown."""
    name, dtype = request.param
    with _implementation(name) as attend_here:
        yield _kernel(name, dtype, attend_here)


def _kernel(name: str, dtype: torch.dtype, attend: Attend) -> Kernel:
    is_exact = (name, dtype) in _EXACT
    if dtype != torch.int8:
        return Kernel(name, dtype, attend, pack, is_exact)

    def attend_in_int8(batch: Batch, *, stats: bool = True, page_masses: bool = True) -> Result:
        keys, values = int8_codes(batch.key_cache), int8_codes(batch.value_cache)
        caches = {"key_cache": keys[0], "key_scales": keys[1], "value_cache": values[0], "value_scales": values[1]}
        return attend(replace(batch, **caches), stats=stats, page_masses=page_masses)

    return Kernel(name, torch.float32, attend_in_int8, pack, is_exact, is_int8=True)


@pytest.fixture
def helpers() -> type[Helpers]:
    return Helpers


class Helpers:
    """What the tests call by name (a conftest is not importable under importlib mode)."""

    pack = staticmethod(pack)
    random_batch = staticmethod(random_batch)
    float8_batch = staticmethod(float8_batch)
    int8_batch = staticmethod(int8_batch)
    check_against_oracle = staticmethod(check_against_oracle)
    compare = staticmethod(compare)
    Result = Result
    isas = ISAS
