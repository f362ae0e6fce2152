"""Attention statistics of served rows against float64 from the same queries and keys."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pagestream import kernels
from pagestream.model import network as network_module
from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.config import ModelConfig
from pagestream.model.loader import load_model
from pagestream.model.runner import Runner
from pagestream.model.step import AttentionSummary, Chunk, SamplingParams, StatsLevel, StepPlan
from tests.model import attention_oracle as oracle
from tests.model.observed_runs import (
    PAGE_SIZE,
    SPANS,
    WINDOWED,
    forced,
    make_cache,
    make_weights,
    queries_of,
    read,
    rows_of,
    texts,
)
from tests.model.test_native import BASE

CONFIGS = {"llama": BASE, "windows": WINDOWED}
ISAS = ("amx", "vnni", "avx2", "baseline")


def compare(
    summary: AttentionSummary,
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    config: ModelConfig,
    tolerance: float,
) -> None:
    assert summary is not None
    windows = [window or None for window in config.windows]
    layers = [oracle.shares(q, k, window) for q, k, window in zip(queries, keys, windows, strict=True)]
    n = keys.shape[2]
    assert summary.context == max(min(n, window or n) for window in windows)
    count = min(3, len(layers))
    cuts = [-(-len(layers) * i // count) for i in range(count + 1)]
    of_group = [layers[begin:end] for begin, end in itertools.pairwise(cuts)]
    for group, exact_layers, bands in zip(summary.groups, of_group, summary.bands, strict=True):
        assert asdict(group) == pytest.approx(oracle.group(exact_layers), abs=tolerance)
        assert bands == pytest.approx(oracle.bands(exact_layers), abs=tolerance)
        assert sum(bands) == pytest.approx(1, abs=1e-5)
    if summary.pages is None:
        return
    heads = np.concatenate(layers)
    starts = np.arange(0, n, PAGE_SIZE)
    masses = np.add.reduceat(heads, starts, axis=-1)
    assert summary.pages.mass == pytest.approx(masses.mean(0), abs=tolerance)
    assert summary.pages.entropy == pytest.approx(np.mean([oracle.entropy(p) for p in masses]), abs=tolerance)
    assert np.frombuffer(summary.pages.head_mass, np.float32) == pytest.approx(masses.ravel(), abs=tolerance)
    covered = np.sort(masses)[:, ::-1].cumsum(-1)
    clear = np.abs(covered - 0.95).min() > tolerance
    assert not clear or summary.pages.pages95 == pytest.approx(np.mean((covered < 0.95).sum(-1) + 1))
    sizes = [size for size in (16, 64, 256, 1024) if PAGE_SIZE <= size < len(starts) * PAGE_SIZE]
    if sizes and len(layers) > 1:
        pages = summary.pages
        found = (pages.head_jsd, pages.coherence_heads, pages.layer_jsd, pages.coherence_layers)
        assert found == pytest.approx(oracle.agreement(layers, sizes), abs=tolerance)
    for share, (begin, end) in zip(summary.pages.spans, SPANS, strict=False):
        assert asdict(share) == pytest.approx(oracle.span(layers, values, begin, end), abs=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("isa", [*ISAS, "operations"])
def test_equal_float64_from_the_same_queries_and_keys(name: str, isa: str) -> None:
    """Through chunks; contexts within a page, over pages, tiles of 64 and splits of 256."""
    config, native = CONFIGS[name], isa != "operations"
    cache = make_cache(config)
    runner = Runner(config, make_weights(config, native=native), cache)
    cases = [(1, []), (2, []), (40, [16]), (64, [3]), (65, [64]), (300, [100, 299]), (600, [64, 320])]
    for tokens, (n, cuts) in zip(texts(config, *(n for n, _ in cases)), cases, strict=True):
        spans = [span for span in SPANS if span[1] <= n]
        blocks = np.random.default_rng(n).permutation(64)[: -(-n // PAGE_SIZE)].tolist()
        with forced(isa) if native else contextlib.nullcontext():
            result = read(runner, tokens, cuts, blocks, attention=StatsLevel.PAGES, spans=spans)
        keys, values = rows_of(cache, 0, blocks, n), rows_of(cache, 1, blocks, n)
        compare(result.attention[0], queries_of(keys), keys, values, config, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("isa", ISAS)
def test_narrow_caches(dtype: torch.dtype, isa: str) -> None:
    """One layer, so that its queries do not depend on the cache: a float32 one tells them. AMX tiles round weights to
    bf16 before they multiply values: that is in the spans' shares."""
    config = replace(BASE, num_layers=1)
    weights, (tokens,), blocks = make_weights(config, native=True), texts(config, 300), list(range(40, 59))
    exact, cache = make_cache(config), make_cache(config, dtype)
    with forced(isa):
        read(Runner(config, weights, exact), tokens, [], blocks)
        result = read(Runner(config, weights, cache), tokens, [], blocks, attention=StatsLevel.PAGES, spans=SPANS)
    keys, values = rows_of(cache, 0, blocks, 300), rows_of(cache, 1, blocks, 300)
    tolerance = 2e-3 if isa == "amx" else 1e-4
    compare(result.attention[0], queries_of(rows_of(exact, 0, blocks, 300)), keys, values, config, tolerance)


def test_the_row_of_a_speculating_chunk_is_the_one_that_is_kept() -> None:
    """Also where the proposed tokens begin a tile of keys."""
    weights, (tokens,) = make_weights(BASE, native=True), texts(BASE, 128)
    blocks, cache = list(range(9)), make_cache(BASE)
    runner = Runner(BASE, weights, cache)
    read(runner, tokens, [], blocks)
    last = Chunk("r", tokens, 50, 127, 1, blocks, SamplingParams(), attention=StatsLevel.PAGES, spans=((0, 128),))
    (alone,) = runner.step(StepPlan((last,))).attention
    speculating = replace(last, length=4, proposed=(1, 2, 3))
    (observed,) = runner.step(StepPlan((speculating,))).attention
    assert observed == alone
    assert observed is not None
    assert observed.context == 128


def test_a_prompt_chunk_that_does_not_sample_is_observed_at_its_last_row() -> None:
    weights, (tokens,) = make_weights(BASE, native=True), texts(BASE, 100)
    cache = make_cache(BASE)
    runner = Runner(BASE, weights, cache)
    chunk = Chunk("r", tokens, 100, 0, 60, list(range(7)), SamplingParams(), attention=StatsLevel.HEADS)
    plain = replace(chunk, request_id="s", block_ids=list(range(10, 17)), attention=StatsLevel.OFF)
    plain_result, result = runner.step(StepPlan((plain, chunk))).attention
    keys, values = (rows_of(cache, part, chunk.block_ids, 60) for part in (0, 1))
    assert plain_result is None
    compare(result, queries_of(keys), keys, values, BASE, 1e-4)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_of_the_default_model(default_model_path: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: str) -> None:
    """A row of the served path, and the same row by PyTorch operations, which tell their queries. The two differ where
    sums in another order round an activation to its neighbour."""
    model = load_model(
        open_checkpoint(default_model_path),
        dtype="int4",
        kv_dtype=kv_dtype,
        device="cpu",
        page_size=PAGE_SIZE,
        max_context=1024,
        token_budget=512,
        kv_memory=64 << 20,
    )
    runner = model.runner
    config, weights, cache = runner._config, runner._network._weights, runner._cache
    (tokens,), n = texts(config, 300), 300
    blocks = list(range(7, 26))
    options = {"attention": StatsLevel.PAGES, "spans": SPANS}
    (served,) = read(runner, tokens, [n - 1], blocks, **options).attention
    queries: list[torch.Tensor] = []
    attend = kernels.paged_attention

    def attention(query: torch.Tensor, *others: object, **more: object) -> None:
        queries.append(query[-1].double())
        attend(query, *others, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(network_module, "native_decoder", lambda *_: None)
    monkeypatch.setattr(kernels, "paged_attention", attention)
    last = Chunk("r", tokens, n, n - 1, 1, blocks, SamplingParams(), **options)  # type: ignore[arg-type]
    (by_operations,) = Runner(config, weights, cache).step(StepPlan((last,))).attention
    exact = (torch.stack(queries).numpy(), rows_of(cache, 0, blocks, n), rows_of(cache, 1, blocks, n), config)
    compare(by_operations, *exact, 1e-4)
    compare(served, *exact, 0.05)
