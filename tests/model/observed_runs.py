"""Runs of small models whose attention is observed.

In these models the query projection is the key projection times a power of two for each head, so the cached key of a
row tells its queries exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pagestream.kernels import build
from pagestream.model.config import ModelConfig
from pagestream.model.kv_cache import KVCache
from pagestream.model.runner import Runner
from pagestream.model.step import Chunk, SamplingParams, StepPlan, StepResult
from pagestream.model.weights import Weights, build_weights
from tests.model.test_native import BASE, LARGER, quantized
from tests.model.test_network_matches_transformers import CPU, randomised

PAGE_SIZE = 16
FACTORS = torch.tensor([1.0, 0.5, 2.0, 0.25])  # of the four query heads
WINDOWED = replace(BASE, architecture="qwen2", sliding_window=(None, 19, 150))
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


def queries_of(keys: np.ndarray) -> np.ndarray:
    """Of the last row, [L, Hq, D], from keys [L, Hkv, n, D]."""
    groups = len(FACTORS) // keys.shape[1]
    return keys[:, :, -1].repeat(groups, axis=1) * FACTORS.double().numpy()[:, None]
