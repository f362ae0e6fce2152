"""Attention statistics of served rows: against float64 from the same queries and keys, and bits they may not change.

In these models the query projection is the key projection times a power of two for each head, so the cached key of a
row tells its queries exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pagestream.kernels import build
from pagestream.model.config import ModelConfig
from pagestream.model.kv_cache import KVCache
from pagestream.model.runner import Runner
from pagestream.model.step import AttentionSummary, Chunk, SamplingParams, StatsLevel, StepPlan, StepResult
from pagestream.model.weights import Weights, build_weights
from tests.model import attention_oracle as oracle
from tests.model.test_native import BASE, LARGER, quantized
from tests.model.test_network_matches_transformers import CPU, randomised

PAGE_SIZE = 16
FACTORS = torch.tensor([1.0, 0.5, 2.0, 0.25])  # of the four query heads
WINDOWED = replace(BASE, architecture="qwen2", sliding_window=(None, 19, 150))
CONFIGS = {"llama": BASE, "windows": WINDOWED}
ISAS = ("amx", "vnni", "avx2", "baseline")
SPANS = ((0, 1), (0, 7), (5, 20))


def make_weights(config: ModelConfig, *, native: bool) -> Weights:
    model = randomised(LlamaForCausalLM(LlamaConfig(**{**LARGER, "num_hidden_layers": config.num_layers})))
    for layer in model.model.layers:
        key = layer.self_attn.k_proj.weight.data.unflatten(0, (config.num_kv_heads, -1))
        queries = key.repeat_interleave(config.num_heads // config.num_kv_heads, 0) * FACTORS[:, None, None]
        layer.self_attn.q_proj.weight.data.copy_(queries.flatten(0, 1))
    if native:
        return quantized(model, config)
    return build_weights(config, model.state_dict().__getitem__, torch.float32, CPU)


def make_cache(config: ModelConfig, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(config, 64, PAGE_SIZE, dtype, CPU)
    cache.storage.fill_(0x7F if dtype == torch.int8 else 0xFF)  # NaN, or large
    return cache


def texts(config: ModelConfig, *sizes: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(config.vocab_size, size=size).tolist() for size in sizes]


def read(
    runner: Runner, tokens: list[int], cuts: Sequence[int], blocks: Sequence[int], **options: object
) -> StepResult:
    """The last of the steps that compute the tokens up to each cut."""
    for start, end in zip((0, *cuts), (*cuts, len(tokens)), strict=False):
        chunk = Chunk("r", tokens, len(tokens), start, end - start, blocks, SamplingParams(), **options)  # type: ignore[arg-type]
        result = runner.step(StepPlan((chunk,)))
    return result


def rows_of(cache: KVCache, part: int, blocks: Sequence[int], n: int) -> np.ndarray:
    """Keys (0) or values (1) of a context, float64 [L, Hkv, n, D]."""
    rows = cache.rows[:, list(blocks), :, part].double()
    if cache.scales is not None:
        rows = rows * cache.scales[:, list(blocks), :, part, :, None].double()
    return torch.cat(rows.unbind(1), 2)[:, :, :n].numpy()


def compare(
    summary: AttentionSummary,
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    config: ModelConfig,
    tolerance: float,
) -> None:
    windows = [window or None for window in config.windows]
    layers = [oracle.shares(q, k, window) for q, k, window in zip(queries, keys, windows, strict=True)]
    n = keys.shape[2]
    assert summary.context == max(min(n, window or n) for window in windows)
    of_group = [layers[i : i + 1] for i in range(3)] if len(layers) == 3 else [layers]
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
    for found, (begin, end) in zip(summary.pages.spans, SPANS, strict=False):
        assert asdict(found) == pytest.approx(oracle.span(layers, values, begin, end), abs=tolerance)


def queries_of(keys: np.ndarray) -> np.ndarray:
    """Of the last row, [L, Hq, D], from keys [L, Hkv, n, D]."""
    groups = len(FACTORS) // keys.shape[1]
    return keys[:, :, -1].repeat(groups, axis=1) * FACTORS.double().numpy()[:, None]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("isa", [*ISAS, "operations"])
def test_equal_float64_from_the_same_queries_and_keys(name: str, isa: str) -> None:
    """Through chunks; contexts within a page, over pages, tiles of 64 and splits of 256."""
    config, native = CONFIGS[name], isa != "operations"
    if native and build.load().implementation != "cpp":
        pytest.skip(build.load().detail)
    cache = make_cache(config)
    runner = Runner(config, make_weights(config, native=native), cache)
    cases = [(1, []), (2, []), (40, [16]), (64, [3]), (65, [64]), (300, [100, 299]), (600, [64, 320])]
    try:
        context = build.forced_isa(isa if native else build.load().isa)
        context.__enter__()
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for tokens, (n, cuts) in zip(texts(config, *(n for n, _ in cases)), cases, strict=True):
            spans = [span for span in SPANS if span[1] <= n - (n // 2 if cuts else 0)]
            blocks = np.random.default_rng(n).permutation(64)[: -(-n // PAGE_SIZE)].tolist()
            read(runner, tokens, cuts[:-1], blocks)
            start = cuts[-1] if cuts else 0
            last = Chunk("r", tokens, n, start, n - start, blocks, SamplingParams(), None, (), StatsLevel.PAGES, spans)
            (summary,) = runner.step(StepPlan((last,))).attention
            keys, values = rows_of(cache, 0, blocks, n), rows_of(cache, 1, blocks, n)
            assert summary is not None
            compare(summary, queries_of(keys), keys, values, config, 1e-4)
    finally:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("isa", ["auto", "avx2"])
def test_narrow_caches(dtype: torch.dtype, isa: str) -> None:
    """One layer, so that its queries do not depend on the cache: a float32 one tells them."""
    if build.load().implementation != "cpp":
        pytest.skip(build.load().detail)
    config = replace(BASE, num_layers=1)
    weights, (tokens,), blocks = make_weights(config, native=True), texts(config, 300), list(range(40, 59))
    exact, cache = make_cache(config), make_cache(config, dtype)
    with build.forced_isa(build.load().isa if isa == "auto" else isa):
        read(Runner(config, weights, exact), tokens, [], blocks)
        result = read(Runner(config, weights, cache), tokens, [], blocks, attention=StatsLevel.PAGES, spans=SPANS)
    keys, values = rows_of(cache, 0, blocks, 300), rows_of(cache, 1, blocks, 300)
    assert result.attention[0] is not None
    compare(result.attention[0], queries_of(rows_of(exact, 0, blocks, 300)), keys, values, config, 2e-3)
