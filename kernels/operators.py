"""The operators: their contracts, schemas and boundary checks. What runs is chosen by torch's dispatcher: the C++
kernel for CPU tensors once it is loaded, else the PyTorch reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagestream.kernels import packing, reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PAGE_SIZES = (16, 32, 64, 128)
_NUM_STATS = 5

torch.library.define(
    "pagestream::paged_attention",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor query_starts, "
    "Tensor context_lengths, float scale, int window, Tensor(a!) out, Tensor(b!)? stats, "
    "Tensor(c!)? page_masses) -> ()",
)
torch.library.define(
    "pagestream::store_kv",
    "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots) -> ()",
)
torch.library.define(
    "pagestream::quantized_linear", "(Tensor input, Tensor codes, Tensor scales, Tensor? mins, Tensor(a!) out) -> ()"
)
torch.library.define("pagestream::dequantize", "(Tensor codes, Tensor scales, Tensor? mins, Tensor(a!) out) -> ()")
torch.library.impl("pagestream::paged_attention", "CompositeExplicitAutograd", reference.paged_attention)
torch.library.impl("pagestream::store_kv", "CompositeExplicitAutograd", reference.store_kv)
torch.library.impl("pagestream::quantized_linear", "CompositeExplicitAutograd", reference.quantized_linear)
torch.library.impl("pagestream::dequantize", "CompositeExplicitAutograd", reference.dequantize)


def _nothing_to_shape(*_args: object) -> None:
    """Fake implementation: everything is written in place."""


torch.library.register_fake("pagestream::paged_attention", _nothing_to_shape)
torch.library.register_fake("pagestream::store_kv", _nothing_to_shape)
torch.library.register_fake("pagestream::quantized_linear", _nothing_to_shape)
torch.library.register_fake("pagestream::dequantize", _nothing_to_shape)


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Write new keys and values `[T, Hkv, D]` into the caches `[P, Hkv, B, D]`, rounding to the caches' dtype.

    `slots` int64 `[T]`: page * B + offset, each at most once. Raises ValueError for a wrong dtype, device, layout or
    shape, and for a slot outside the cache (the reference: IndexError).
    """
    _check_floats(("key", key), ("value", value))
    _check_floats(("key_cache", key_cache), ("value_cache", value_cache))
    _check_dtype(torch.int64, ("slots", slots))
    _check_device(key_cache, ("key", key), ("value", value), ("value_cache", value_cache), ("slots", slots))
    _check_dense(("key", key), ("value", value), dims=3, dense=1)
    _check_dense(("key_cache", key_cache), ("value_cache", value_cache), dims=4, dense=2)
    _check_dense(("slots", slots), dims=1, dense=1)
    _check_cache_shapes(key_cache, value_cache)
    expected = (slots.shape[0], key_cache.shape[1], key_cache.shape[3])
    _check_shape(("key", key, expected), ("value", value, expected))
    _load_cpu_kernels(key_cache)
    torch.ops.pagestream.store_kv.default(key, value, key_cache, value_cache, slots)


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
) -> None:
    """Causal attention of new rows over paged keys and values, for a batch of sequences with any mix of new rows.

    `query`, `out` `[T, Hq, D]`; caches `[P, Hkv, B, D]`, Hq a multiple of Hkv, D a multiple of 8, B one of 16, 32,
    64, 128. `block_tables` int32 `[S, M]`; `query_starts` int32 `[S + 1]`; `context_lengths` int32 `[S]`: cached
    tokens, the new rows included and already stored. Row i of sequence s, of q_len = query_starts[s + 1] -
    query_starts[s], sits at position context_lengths[s] - q_len + i and attends to the positions up to its own, and
    above its own - `window` when `window` is positive. Slots and block-table entries beyond a sequence are not read.
    Scores are `scale` * <q, k>; all arithmetic is float32 whatever the dtypes.

    `stats` float32 `[T, Hq, 5]` receives, over the attended positions: log-sum-exp of the scores (nats), entropy of
    the weights (nats), the largest weight, the mass on positions 0 to 3, the mass on the last 64. `page_masses`
    float32 `[T, Hq, M]` receives the mass per entry of the block table, 0 where nothing is attended. Neither changes
    a bit of `out`.

    Raises ValueError for a wrong dtype, device, layout, shape or value of `window`, and for lengths or page ids that
    point outside the tensors (the reference: IndexError, and only where it meets one).
    """
    _check_floats(("query", query), ("out", out))
    _check_floats(("key_cache", key_cache), ("value_cache", value_cache))
    integers = (("block_tables", block_tables), ("query_starts", query_starts), ("context_lengths", context_lengths))
    statistics = [(n, t) for n, t in (("stats", stats), ("page_masses", page_masses)) if t is not None]
    _check_dtype(torch.int32, *integers)
    _check_dtype(torch.float32, *statistics)
    _check_device(query, ("out", out), ("key_cache", key_cache), ("value_cache", value_cache), *integers, *statistics)
    _check_dense(("query", query), ("out", out), dims=3, dense=1)
    _check_dense(("key_cache", key_cache), ("value_cache", value_cache), dims=4, dense=2)
    _check_dense(integers[0], dims=2, dense=1)
    _check_dense(*integers[1:], dims=1, dense=1)
    _check_dense(*statistics, dims=3, dense=3)
    _check_cache_shapes(key_cache, value_cache)
    _check_attention_shapes(query, key_cache, block_tables, query_starts, context_lengths)
    expected = {"stats": (*query.shape[:2], _NUM_STATS), "page_masses": (*query.shape[:2], block_tables.shape[1])}
    _check_shape(("out", out, query.shape), *((name, tensor, expected[name]) for name, tensor in statistics))
    if window < 0:
        raise ValueError(f"window is {window}: 0 means no window")
    _load_cpu_kernels(query)
    torch.ops.pagestream.paged_attention.default(
        query,
        key_cache,
        value_cache,
        block_tables,
        query_starts,
        context_lengths,
        scale,
        window,
        out,
        stats,
        page_masses,
    )


def quantized_linear(input: Tensor, codes: Tensor, scales: Tensor, mins: Tensor | None, *, out: Tensor) -> None:  # noqa: A002
    """`out` [M, N] = `input` [M, K] times the transpose of a weight [N, K] packed as in packing.py (8-bit: no mins).

    The input is rounded to integers, symmetric, for each row and group of 32: x = s * q, s = max |x| / 127. A group's
    dot product of integers is exact; groups are added in float32, in order. A row's result does not depend on the rows
    beside it; a NaN in a row makes the row NaN. `input` and `out` share one of float32, bfloat16, float16.
    Raises ValueError for a wrong dtype, device, layout or shape.
    """
    _check_floats(("input", input), ("out", out))
    _check_packed(codes, scales, mins)
    _check_device(input, ("out", out), ("codes", codes))
    _check_dense(("input", input), ("out", out), dims=2, dense=1)
    rows, blocks = len(input), len(codes)
    _check_shape(("input", input, (rows, codes.shape[1] * packing.GROUP)), ("out", out, (rows, out.shape[1])))
    if -(-out.shape[1] // packing.BLOCK) != blocks:
        raise ValueError(f"out has {out.shape[1]} columns, codes {blocks} blocks of {packing.BLOCK}")
    _load_cpu_kernels(input)
    torch.ops.pagestream.quantized_linear.default(input, codes, scales, mins, out)


def dequantize(codes: Tensor, scales: Tensor, mins: Tensor | None) -> Tensor:
    """A packed weight, transposed, in bfloat16 [K, N padded to blocks of 16]. Raises ValueError as quantized_linear."""
    _check_packed(codes, scales, mins)
    _load_cpu_kernels(codes)
    blocks, groups = codes.shape[:2]
    out = codes.new_empty((groups * packing.GROUP, blocks * packing.BLOCK), dtype=torch.bfloat16)
    torch.ops.pagestream.dequantize.default(codes, scales, mins, out)
    return out


def _load_cpu_kernels(tensor: Tensor) -> None:
    if tensor.device.type == "cpu":
        from pagestream.kernels import build  # noqa: PLC0415  # here, so that `python -m pagestream.kernels.build` runs it once

        build.load()


_Named = tuple[str, Tensor]


def _check_floats(*pair: _Named) -> None:
    (first_name, first), (second_name, second) = pair
    if first.dtype not in _FLOATS or second.dtype != first.dtype:
        raise ValueError(
            f"{first_name} and {second_name} must share one dtype of float32, bfloat16, float16; "
            f"they are {first.dtype} and {second.dtype}"
        )


def _check_dtype(dtype: torch.dtype, *tensors: _Named) -> None:
    for name, tensor in tensors:
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}; it is {tensor.dtype}")


def _check_device(reference_tensor: Tensor, *tensors: _Named) -> None:
    for name, tensor in tensors:
        if tensor.device != reference_tensor.device:
            raise ValueError(f"{name} is on {tensor.device}, others are on {reference_tensor.device}")


def _check_dense(*tensors: _Named, dims: int, dense: int) -> None:
    """`dims` dimensions, of which the last `dense` lie contiguously (a dimension of size 1 may have any stride)."""
    for name, tensor in tensors:
        if tensor.dim() == dims and tensor.is_contiguous():
            continue
        shape, strides = tensor.shape, tensor.stride()
        if len(shape) != dims:
            raise ValueError(f"{name} must have {dims} dimensions; it has shape {tuple(shape)}")
        expected = 1
        for dim in range(dims - 1, dims - 1 - dense, -1):
            if strides[dim] != expected and shape[dim] > 1:
                raise ValueError(f"the last {dense} dimensions of {name} must be contiguous; its strides are {strides}")
            expected *= shape[dim]


def _check_shape(*tensors: tuple[str, Tensor, tuple[int, ...]]) -> None:
    for name, tensor, expected in tensors:
        if tensor.shape != expected:
            raise ValueError(f"{name} must have shape {tuple(expected)}; it has {tuple(tensor.shape)}")


def _check_packed(codes: Tensor, scales: Tensor, mins: Tensor | None) -> None:
    groups = [("scales", scales), *([("mins", mins)] if mins is not None else [])]
    _check_dtype(torch.uint8, ("codes", codes))
    _check_dtype(torch.float16, *groups)
    _check_device(codes, *groups)
    _check_dense(("codes", codes), *groups, dims=3, dense=3)
    code_bytes = packing.BLOCK * packing.GROUP // (1 if mins is None else 2)
    expected = (*codes.shape[:2], packing.BLOCK)
    _check_shape(("codes", codes, (*expected[:2], code_bytes)), *((name, tensor, expected) for name, tensor in groups))


def _check_cache_shapes(key_cache: Tensor, value_cache: Tensor) -> None:
    if value_cache.shape != key_cache.shape:
        raise ValueError(
            f"key_cache {tuple(key_cache.shape)} and value_cache {tuple(value_cache.shape)} differ in shape"
        )
    if key_cache.shape[2] not in _PAGE_SIZES:
        raise ValueError(f"the page size must be one of {_PAGE_SIZES}; it is {key_cache.shape[2]}")
    if key_cache.shape[3] % 8 != 0:
        raise ValueError(f"the head size must be a multiple of 8; it is {key_cache.shape[3]}")


def _check_attention_shapes(
    query: Tensor, key_cache: Tensor, block_tables: Tensor, query_starts: Tensor, context_lengths: Tensor
) -> None:
    num_heads, head_size = query.shape[1:]
    num_kv_heads = key_cache.shape[1]
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    if head_size != key_cache.shape[3]:
        raise ValueError(f"query has head size {head_size}, the caches have {key_cache.shape[3]}")
    num_sequences = context_lengths.shape[0]
    if block_tables.shape[0] != num_sequences or query_starts.shape[0] != num_sequences + 1:
        raise ValueError(
            f"context_lengths has {num_sequences} sequences, block_tables {block_tables.shape[0]}, "
            f"query_starts {query_starts.shape[0]} entries (one more than sequences)"
        )
