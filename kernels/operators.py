"""The operators: their contracts, schemas and boundary checks. What runs is chosen by torch's dispatcher: the
kernels for the tensors' device once they are loaded, else the PyTorch reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagestream.kernels import packing, reference
from pagestream.kernels.checks import (
    FLOAT8,
    check_attention,
    check_caches,
    check_dense,
    check_device,
    check_dtype,
    check_floats,
    check_packed,
    check_scales,
    check_shape,
    check_window,
    check_workspace,
)

_GPU_HEAD_SIZES = (64, 80, 96, 128)

torch.library.define(
    "pagestream::paged_attention",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor query_starts, "
    "Tensor context_lengths, float scale, int window, Tensor(a!) out, Tensor(b!)? stats, "
    "Tensor(c!)? page_masses, Tensor(d!)? workspace=None, Tensor? key_scales=None, Tensor? value_scales=None) -> ()",
)
torch.library.define(
    "pagestream::plan_attention",
    "(Tensor query_starts, Tensor context_lengths, int num_heads, int num_kv_heads, int head_size, int window, "
    "Tensor(a!) workspace) -> ()",
)
torch.library.define(
    "pagestream::attention_workspace_size", "(Tensor query, Tensor? page_masses=None, int page_size=16) -> int"
)
torch.library.define(
    "pagestream::store_kv",
    "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots, "
    "Tensor(c!)? key_scales=None, Tensor(d!)? value_scales=None) -> ()",
)
torch.library.define(
    "pagestream::quantized_linear",
    "(Tensor input, Tensor codes, Tensor scales, Tensor? mins, Tensor(a!) out, int prefill_rows) -> ()",
)
torch.library.impl("pagestream::paged_attention", "CompositeExplicitAutograd", reference.paged_attention)
torch.library.impl("pagestream::store_kv", "CompositeExplicitAutograd", reference.store_kv)
torch.library.impl("pagestream::quantized_linear", "CompositeExplicitAutograd", reference.quantized_linear)


def _nothing_to_shape(*_args: object) -> None:
    """Fake implementation: everything is written in place."""


def _no_workspace(_query: Tensor, _page_masses: Tensor | None = None, _page_size: int = 16) -> int:
    return 0


torch.library.register_fake("pagestream::paged_attention", _nothing_to_shape)
torch.library.register_fake("pagestream::store_kv", _nothing_to_shape)
torch.library.register_fake("pagestream::plan_attention", _nothing_to_shape)
# Only CUDA plans: elsewhere a workspace has no elements.
torch.library.impl("pagestream::plan_attention", "CompositeExplicitAutograd", _nothing_to_shape)
torch.library.impl("pagestream::attention_workspace_size", "CompositeExplicitAutograd", _no_workspace)
torch.library.register_fake("pagestream::quantized_linear", _nothing_to_shape)


def store_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Write new keys and values `[T, Hkv, D]` into the caches `[P, Hkv, B, D]`, rounding to the caches' dtype.

    `slots` int64 `[T]`: page * B + offset, each at most once. Caches of int8 receive x / s, rounded to nearest, and
    `key_scales` and `value_scales`, float32 `[P, Hkv, B]`, s = max |x| / 127 of the row and head; a NaN or infinity
    in a row makes s one. Raises ValueError for a wrong dtype, device, layout or shape, and for a slot outside the
    cache (the reference: IndexError).
    """
    check_floats(("key", key), ("value", value))
    check_caches(key_cache, value_cache)
    if key_cache.dtype == FLOAT8:
        raise ValueError(f"key_cache is {FLOAT8}: append_kv takes it, store_kv does not")
    check_scales(key_cache, key_scales=key_scales, value_scales=value_scales)
    check_dtype(torch.int64, ("slots", slots))
    check_device(key_cache, ("key", key), ("value", value), ("value_cache", value_cache), ("slots", slots))
    check_dense(("key", key), ("value", value), dims=3, dense=1)
    check_dense(("slots", slots), dims=1, dense=1)
    expected = (slots.shape[0], key_cache.shape[1], key_cache.shape[3])
    check_shape(("key", key, expected), ("value", value, expected))
    load_kernels(key_cache)
    torch.ops.pagestream.store_kv.default(key, value, key_cache, value_cache, slots, key_scales, value_scales)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    scale: float,
    window: int = 0,
    out: Tensor,
    stats: Tensor | None = None,
    page_masses: Tensor | None = None,
    workspace: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Causal attention of new rows over paged keys and values, for a batch of sequences with any mix of new rows.

    `query`, `out` `[T, Hq, D]`; caches `[P, Hkv, B, D]`, Hq a multiple of Hkv, D a multiple of 8, B one of 16, 32,
    64, 128. `block_tables` int32 `[S, M]`; `query_starts` int32 `[S + 1]`; `context_lengths` int32 `[S]`: cached
    tokens, the new rows included and already stored. Row i of sequence s, of q_len = query_starts[s + 1] -
    query_starts[s], sits at position context_lengths[s] - q_len + i and attends to the positions up to its own, and
    above its own - `window` when `window` is positive. Slots and block-table entries beyond a sequence are not read.
    Scores are `scale` * <q, k>; all arithmetic is float32 whatever the dtypes, but for these. CUDA: weights multiply
    the values in the dtype of the query, or in float16 when the caches are e4m3. A CPU with AMX, bfloat16 or int8
    caches and D a multiple of 64: weights, times the value's scale, multiply the values in bfloat16, and a wider query
    counts with 16 bits.

    Caches of float8_e4m3fn (CUDA; elsewhere the reference) hold keys and values divided by `key_scales` and
    `value_scales`, float32 `[Hkv]`, 1 by default. Caches of int8 (a CPU; elsewhere the reference) hold what `store_kv`
    writes, and need its `key_scales` and `value_scales`, float32 `[P, Hkv, B]`.

    `stats` float32 `[T, Hq, 5]` receives, over the attended positions: log-sum-exp of the scores (nats), entropy of
    the weights (nats), the largest weight, the mass on positions 0 to 3, the mass on the last 64. `page_masses`
    float32 `[T, Hq, M]` receives the mass per entry of the block table, 0 where nothing is attended. Neither changes
    a bit of `out`.

    `workspace`: planned by `plan_attention` for these lengths, heads and window, which saves a GPU planning anew in
    each layer, and allocating: then nothing does. Without one the call sees to it itself.

    Raises ValueError for a wrong dtype, device, layout, shape or value of `window`, and for lengths or page ids that
    point outside the tensors (the reference: IndexError, and only where it meets one; CUDA: unchecked, as nothing is
    read back).
    """
    lengths, scales = (block_tables, query_starts, context_lengths), (key_scales, value_scales)
    check_attention(query, key_cache, value_cache, *lengths, out, stats, page_masses, *scales)
    check_window(window)
    if workspace is not None:
        check_workspace(query, workspace)
    load_kernels(query)
    has_kernel = _has_kernel(query, key_cache)
    operator = torch.ops.pagestream.paged_attention.default if has_kernel else reference.paged_attention
    operator(query, key_cache, value_cache, *lengths, scale, window, out, stats, page_masses, workspace, *scales)


def attention_workspace(query: Tensor, *, page_masses: Tensor | None = None, page_size: int = 16) -> Tensor:
    """What `paged_attention` needs besides its arguments for any batch on this device whose queries have the head size
    of `query` `[T, Hq, D]`: float32, made once and planned in each step. Without elements where none is needed.

    `page_masses` `[T, Hq, M]`: the largest that calls will be given, for pages of `page_size`; a call whose page masses
    do not fit raises RuntimeError.
    """
    load_kernels(query)
    size = torch.ops.pagestream.attention_workspace_size.default(query, page_masses, page_size)
    return torch.empty(size, dtype=torch.float32, device=query.device)


def plan_attention(
    query_starts: Tensor,
    context_lengths: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    window: int = 0,
    workspace: Tensor,
) -> None:
    """Cut the attention of a step into equal parts, on the device: once for all layers that share these arguments.

    `query_starts` int32 `[S + 1]` and `context_lengths` int32 `[S]` as in `paged_attention`; `workspace` from
    `attention_workspace`. Reads nothing back, so a CUDA graph can capture it. Raises ValueError for a wrong dtype,
    device, layout, shape or value of `window`.
    """
    lengths = (("query_starts", query_starts), ("context_lengths", context_lengths))
    check_dtype(torch.int32, *lengths)
    check_device(workspace, *lengths)
    check_dense(*lengths, dims=1, dense=1)
    check_shape(("query_starts", query_starts, (context_lengths.shape[0] + 1,)))
    check_window(window)
    check_workspace(query_starts, workspace)
    load_kernels(workspace)
    torch.ops.pagestream.plan_attention.default(
        query_starts, context_lengths, num_heads, num_kv_heads, head_size, window, workspace
    )


def quantized_linear(
    input: Tensor,  # noqa: A002
    codes: Tensor,
    scales: Tensor,
    mins: Tensor | None,
    *,
    out: Tensor,
    prefill_rows: int = 0,
) -> None:
    """`out` [M, N] = `input` [M, K] times the transpose of a weight [N, K] packed as in packing.py (8-bit: no mins).

    The input is rounded to integers, symmetric, for each row and span of 256: x = s * q, s = max |x| / 2039. A group's
    dot product of integers is exact; groups are added in float32, in order. A row's result does not depend on the rows
    beside it; a NaN in a row makes the row NaN.

    The last `prefill_rows` rows, those of prompts, have another, faster arithmetic where the machine has one (AMX):
    they and the weights are rounded to bfloat16, products are added in float32 in the order of the inputs. So a row's
    bits depend on its kind, but not on how many there are.

    `input` and `out` share one of float32, bfloat16, float16.
    Raises ValueError for a wrong dtype, device, layout or shape.
    """
    check_floats(("input", input), ("out", out))
    check_packed(codes, scales, mins)
    check_device(input, ("out", out), ("codes", codes))
    check_dense(("input", input), ("out", out), dims=2, dense=1)
    rows, blocks = len(input), len(codes)
    check_shape(("input", input, (rows, codes.shape[1] * packing.GROUP)), ("out", out, (rows, out.shape[1])))
    if -(-out.shape[1] // packing.BLOCK) != blocks:
        raise ValueError(f"out has {out.shape[1]} columns, codes {blocks} blocks of {packing.BLOCK}")
    if not 0 <= prefill_rows <= rows:
        raise ValueError(f"prefill_rows is {prefill_rows} of {rows}")
    load_kernels(input)
    torch.ops.pagestream.quantized_linear.default(input, codes, scales, mins, out, prefill_rows)


def _has_kernel(query: Tensor, key_cache: Tensor) -> bool:
    """What the kernels of a device do not take, the reference serves there too."""
    if not query.is_cuda:
        return key_cache.dtype != FLOAT8
    return gpu_takes(query.dtype, key_cache.dtype) and query.shape[2] in _GPU_HEAD_SIZES


def gpu_takes(rows: torch.dtype, cache: torch.dtype) -> bool:
    """Which queries, keys and values the CUDA kernels take, and with which caches."""
    return rows != torch.float32 and cache in (rows, FLOAT8)


def load_kernels(tensor: Tensor) -> None:
    """Build and load what serves tensors of this device, once per process."""
    if tensor.device.type in {"cpu", "cuda"}:
        from pagestream.kernels import build  # noqa: PLC0415  # here, so that `python -m pagestream.kernels.build` runs it once

        build.load()
