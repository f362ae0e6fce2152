"""What else computes attention on a GPU, for bench_cuda.py: torch's SDPA as it chooses and held to FlashAttention,
FlexAttention compiled, and flash-attn and FlashInfer where they can be imported.

A peer is a step: one call for each copy of the cache, the outputs of which it returns. Those of torch and flash-attn
get contiguous keys and values; FlashInfer gets the same pages as we do, planned on the host before, which is not timed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

_FLEX_MAX_BATCH, _FLEX_CONTEXTS = 8, (1024, 8192, 32768)  # each shape takes seconds to compile

Step = Callable[[], Sequence[Tensor]]  # outputs [batch, rows, Hq, D]


@dataclass(frozen=True, slots=True)
class Problem:
    """Sequences of equal length, each with new rows at its end."""

    query: Tensor  # [batch, rows, Hq, D]
    key_cache: Tensor  # [P, Hkv, B, D]
    value_cache: Tensor
    tables: Tensor  # [copies, batch, M] int32
    context: int

    def dense(self) -> list[tuple[Tensor, Tensor]]:
        """Contiguous keys and values [batch, Hkv, n, D] of each copy."""

        def contiguous(cache: Tensor, pages: Tensor) -> Tensor:
            heads = cache[pages.long()].transpose(2, 3).flatten(1, 2).transpose(1, 2)
            return heads[:, :, : self.context].contiguous()

        return [(contiguous(self.key_cache, pages), contiguous(self.value_cache, pages)) for pages in self.tables]


def peers(problem: Problem) -> dict[str, Callable[[], Step]]:
    """Makers of steps: what is made holds copies of the caches, so use one at a time."""
    found: dict[str, Callable[[], Step]] = {
        "sdpa": lambda: sdpa(problem),
        "sdpa_flash": lambda: sdpa(problem, SDPBackend.FLASH_ATTENTION),
    }
    if problem.query.shape[0] <= _FLEX_MAX_BATCH and problem.context in _FLEX_CONTEXTS:
        found["flex"] = lambda: flex(problem)
    if importlib.util.find_spec("flash_attn") is not None:
        found["flash_attn"] = lambda: _flash_attn(problem)
    if importlib.util.find_spec("flashinfer") is not None and problem.query.shape[1] == 1:
        found["flashinfer"] = lambda: _flashinfer(problem)
    return found


def sdpa(problem: Problem, backend: SDPBackend | None = None) -> Step:
    """As torch chooses, or held to one backend, which raises RuntimeError for what it does not take."""
    query, caches = problem.query.transpose(1, 2), problem.dense()
    rows = query.shape[2]
    bias = causal_lower_right(rows, problem.context) if rows > 1 else None

    def attend() -> list[Tensor]:
        outputs = [scaled_dot_product_attention(query, *kv, attn_mask=bias, enable_gqa=True) for kv in caches]
        return [out.transpose(1, 2) for out in outputs]

    def held(only: SDPBackend) -> list[Tensor]:
        with sdpa_kernel([only]):
            return attend()

    return attend if backend is None else lambda: held(backend)


def flex(problem: Problem, *, compiled: bool = True) -> Step:
    """FlexAttention, compiled for this shape; a decode takes its split-KV kernel."""
    query, caches = problem.query.transpose(1, 2).contiguous(), problem.dense()
    rows, past = query.shape[2], problem.context - query.shape[2]
    mask = None
    if rows > 1:
        mask = create_block_mask(
            lambda _b, _h, row, key: key <= past + row, None, None, rows, problem.context, device=str(query.device)
        )
    torch.compiler.reset()  # else torch stops compiling after some shapes, and times its unfused fallback
    attention = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def attend() -> list[Tensor]:
        outputs = [attention(query, *kv, block_mask=mask, enable_gqa=True) for kv in caches]
        return [out.transpose(1, 2) for out in outputs]

    return attend


def _flash_attn(problem: Problem) -> Step:
    attend = importlib.import_module("flash_attn").flash_attn_with_kvcache
    caches = [(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in problem.dense()]
    return lambda: [attend(problem.query, *kv, causal=True) for kv in caches]


def _flashinfer(problem: Problem) -> Step:
    """Its decode wrapper for CUDA graphs, on our pages."""
    wrapper_class = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    batch, _, heads, size = problem.query.shape
    kv_heads, page_size = problem.key_cache.shape[1:3]
    pages = -(-problem.context // page_size)
    query, cache = problem.query[:, 0], (problem.key_cache, problem.value_cache)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * pages
    last = torch.full((batch,), problem.context - (pages - 1) * page_size, dtype=torch.int32, device=query.device)
    wrappers = []
    for tables in problem.tables:
        indices = tables[:, :pages].flatten().contiguous()
        wrapper = wrapper_class(
            torch.empty(128 << 20, dtype=torch.uint8, device=query.device),
            "HND",
            use_cuda_graph=True,
            paged_kv_indptr_buffer=starts.clone(),
            paged_kv_indices_buffer=indices.clone(),
            paged_kv_last_page_len_buffer=last.clone(),
        )
        wrapper.plan(
            starts, indices, last, heads, kv_heads, size, page_size, q_data_type=query.dtype, kv_data_type=query.dtype
        )
        wrappers.append(wrapper)
    return lambda: [wrapper.run(query, cache)[:, None] for wrapper in wrappers]
