"""Attention statistics of served rows: against float64 from the same queries and keys, and the bits they keep.

In these models the query projection is the key projection times a power of two for each head, so the cached key of a
row tells its queries exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def forced(isa: str) -> Iterator[None]:
    """Skips where this machine has no such kernels."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(build.forced_isa(isa))
        except ValueError as error:
            pytest.skip(str(error))
        yield


def texts(config: ModelConfig, *sizes: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(config.vocab_size, size=size).tolist() for size in sizes]


def read(
    runner: Runner, tokens: list[int], cuts: Sequence[int], blocks: Sequence[int], **options: object
) -> StepResult:
    """The last of the steps that compute the tokens up to each cut; the options are its chunk's."""
    for start, end in zip((0, *cuts), cuts, strict=False):
        runner.step(StepPlan((Chunk("r", tokens, len(tokens), start, end - start, blocks, SamplingParams()),)))
    start = cuts[-1] if cuts else 0
    last = Chunk("r", tokens, len(tokens), start, len(tokens) - start, blocks, SamplingParams())
    return runner.step(StepPlan((replace(last, **options),)))  # type: ignore[arg-type]


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
    assert summary is not None
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
@pytest.mark.parametrize("isa", ["amx", "avx2"])
def test_narrow_caches(dtype: torch.dtype, isa: str) -> None:
    """One layer, so that its queries do not depend on the cache: a float32 one tells them."""
    config = replace(BASE, num_layers=1)
    weights, (tokens,), blocks = make_weights(config, native=True), texts(config, 300), list(range(40, 59))
    exact, cache = make_cache(config), make_cache(config, dtype)
    with forced(isa):
        read(Runner(config, weights, exact), tokens, [], blocks)
        result = read(Runner(config, weights, cache), tokens, [], blocks, attention=StatsLevel.PAGES, spans=SPANS)
    keys, values = rows_of(cache, 0, blocks, 300), rows_of(cache, 1, blocks, 300)
    compare(result.attention[0], queries_of(rows_of(exact, 0, blocks, 300)), keys, values, config, 2e-3)


def batch_of(streams: list[tuple[list[int], int, list[int]]], **options: object) -> StepPlan:
    """Of each stream, (tokens, start, blocks), what is left to compute."""
    samplings = (SamplingParams(logprobs=2), SamplingParams(temperature=1.0, seed=3, logprobs=2))
    chunks = (
        Chunk(str(i), tokens, len(tokens) - 1, start, len(tokens) - start, blocks, samplings[i % 2], **options)  # type: ignore[arg-type]
        for i, (tokens, start, blocks) in enumerate(streams)
    )
    return StepPlan(tuple(chunks))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_asking_changes_no_bit(dtype: torch.dtype, *, native: bool) -> None:
    """Of tokens, logprobs and caches, in a batch of decodes and a prompt chunk, at every level."""
    weights = make_weights(WINDOWED, native=native)
    tokens = texts(WINDOWED, 300, 40, 130)
    blocks = [list(range(20)), list(range(20, 30)), list(range(30, 40))]
    results, storages = [], []
    for options in (
        {},
        {"attention": StatsLevel.HEADS},
        {"attention": StatsLevel.PAGES, "spans": SPANS, "output_stats": True},
    ):
        cache = make_cache(WINDOWED, dtype)
        runner = Runner(WINDOWED, weights, cache)
        runner.step(batch_of([(t[:-1], 0, b) for t, b in zip(tokens[:2], blocks, strict=False)], **options))
        starts = (299, 39, 0)
        result = runner.step(batch_of(list(zip(tokens, starts, blocks, strict=True)), **options))
        results.append([[(t.token_id, t.logprob, t.top_logprobs) for t in chunk] for chunk in result.sampled])
        storages.append(cache.storage)
    assert results[0] == results[1] == results[2]
    assert all(torch.equal(storages[0], storage) for storage in storages[1:])


def test_do_not_depend_on_batch_chunks_prefix_hits_pages_or_threads() -> None:
    """To the last bit, where the kernels do the work."""
    if build.load().implementation != "cpp":
        pytest.skip(build.load().detail)
    weights, (tokens, other, third) = make_weights(WINDOWED, native=True), texts(WINDOWED, 300, 90, 40)
    options = {"attention": StatsLevel.PAGES, "spans": SPANS}

    def fresh() -> Runner:
        return Runner(WINDOWED, weights, make_cache(WINDOWED, torch.bfloat16))

    (alone,) = read(fresh(), tokens, [], list(range(19)), **options).attention
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        (chunked,) = read(fresh(), tokens, [7, 250], list(range(40, 59)), **options).attention
    finally:
        torch.set_num_threads(before)
    sharing = fresh()
    read(sharing, [*tokens[:160], 5, 6], [], list(range(11)))  # its first ten pages are found again
    blocks = [*range(10), *range(20, 29)]
    hit = sharing.step(
        batch_of([(tokens, 160, blocks), (other, 0, list(range(30, 36))), (third, 0, [40, 41, 42])], **options)
    )
    assert alone is not None
    assert alone.pages is not None
    assert alone == chunked == hit.attention[0]


def test_the_row_of_a_speculating_chunk_is_the_one_that_is_kept() -> None:
    weights, (tokens,) = make_weights(BASE, native=True), texts(BASE, 100)
    blocks, cache = list(range(8)), make_cache(BASE)
    runner = Runner(BASE, weights, cache)
    read(runner, tokens, [], blocks)
    last = Chunk("r", tokens, 50, 99, 1, blocks, SamplingParams(), attention=StatsLevel.PAGES, spans=((0, 100),))
    (alone,) = runner.step(StepPlan((last,))).attention
    speculating = replace(last, length=4, proposed=(1, 2, 3))
    (observed,) = runner.step(StepPlan((speculating,))).attention
    assert observed == alone
    assert observed is not None
    assert observed.context == 100


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


def test_nothing_is_said_where_nothing_is_asked() -> None:
    native, dense = (Runner(BASE, make_weights(BASE, native=n), make_cache(BASE)) for n in (True, False))
    for runner in (native, dense):
        assert read(runner, [1, 2, 3], [], [0]).attention == ()
    assert read(dense, [1, 2, 3], [], [0]).seconds is None
    if build.load().implementation == "cpp":
        first, second = (read(native, [1, 2, 3], [], [0]).seconds for _ in range(2))
        assert first is not None
        assert second is not None
        assert all(0 < seconds < 10 for seconds in (*first, *second))


@pytest.mark.parametrize("span", [(-1, 2), (2, 2), (0, 4)])
def test_spans_outside_the_context_are_refused_by_name(span: tuple[int, int]) -> None:
    runner = Runner(BASE, make_weights(BASE, native=True), make_cache(BASE))
    with pytest.raises(ValueError, match="r: span"):
        read(runner, [1, 2, 3], [], [0], attention=StatsLevel.PAGES, spans=(span,))
