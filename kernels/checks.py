"""The checks at the operators' boundary, each of which raises ValueError and names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from pagestream.kernels import packing

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8 = torch.float8_e4m3fn
PAGE_SIZES = (16, 32, 64, 128)
NUM_STATS = 5

Named = tuple[str, Tensor]


def check_floats(*pair: Named) -> None:
    (first_name, first), (second_name, second) = pair
    if first.dtype not in FLOATS or second.dtype != first.dtype:
        raise ValueError(
            f"{first_name} and {second_name} must share one dtype of float32, bfloat16, float16; "
            f"they are {first.dtype} and {second.dtype}"
        )


def check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    """One dtype, of which int8 and e4m3 may be one; pages and heads may have any stride."""
    if key_cache.dtype not in (torch.int8, FLOAT8) or value_cache.dtype != key_cache.dtype:
        check_floats(("key_cache", key_cache), ("value_cache", value_cache))
    check_dense(("key_cache", key_cache), ("value_cache", value_cache), dims=4, dense=2)
    check_cache_shapes(key_cache, value_cache)


def check_scales(key_cache: Tensor, **scales: Tensor | None) -> None:
    """Float32: `[P, Hkv, B]` for int8, `[Hkv]` or none for e4m3; other types hold keys and values as they are."""
    given = [(name, scale) for name, scale in scales.items() if scale is not None]
    is_int8 = key_cache.dtype == torch.int8
    if is_int8 and len(given) < len(scales):
        raise ValueError(f"caches of {torch.int8} need {' and '.join(scales)}")
    if given and not is_int8 and key_cache.dtype != FLOAT8:
        raise ValueError(f"{given[0][0]} is for caches of {torch.int8} or {FLOAT8}; they are {key_cache.dtype}")
    expected = tuple(key_cache.shape[:3]) if is_int8 else (key_cache.shape[1],)
    check_dtype(torch.float32, *given)
    check_device(key_cache, *given)
    check_dense(*given, dims=len(expected), dense=1)
    check_shape(*((name, scale, expected) for name, scale in given))


def check_dtype(dtype: torch.dtype, *tensors: Named) -> None:
    for name, tensor in tensors:
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}; it is {tensor.dtype}")


def check_device(reference_tensor: Tensor, *tensors: Named) -> None:
    for name, tensor in tensors:
        if tensor.device != reference_tensor.device:
            raise ValueError(f"{name} is on {tensor.device}, others are on {reference_tensor.device}")


def check_dense(*tensors: Named, dims: int, dense: int) -> None:
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


def check_shape(*tensors: tuple[str, Tensor, tuple[int, ...]]) -> None:
    for name, tensor, expected in tensors:
        if tensor.shape != expected:
            raise ValueError(f"{name} must have shape {tuple(expected)}; it has {tuple(tensor.shape)}")


def check_packed(codes: Tensor, scales: Tensor, mins: Tensor | None) -> None:
    groups = [("scales", scales), *([("mins", mins)] if mins is not None else [])]
    check_dtype(torch.uint8, ("codes", codes))
    check_dtype(torch.float16, *groups)
    check_device(codes, *groups)
    check_dense(("codes", codes), *groups, dims=3, dense=3)
    code_bytes = packing.BLOCK * packing.GROUP // (1 if mins is None else 2)
    expected = (*codes.shape[:2], packing.BLOCK)
    check_shape(("codes", codes, (*expected[:2], code_bytes)), *((name, tensor, expected) for name, tensor in groups))


def check_window(window: int) -> None:
    if window < 0:
        raise ValueError(f"window is {window}: 0 means no window")


def check_workspace(neighbour: Tensor, workspace: Tensor) -> None:
    check_dtype(torch.float32, ("workspace", workspace))
    check_device(neighbour, ("workspace", workspace))
    check_dense(("workspace", workspace), dims=1, dense=1)


def check_cache_shapes(key_cache: Tensor, value_cache: Tensor) -> None:
    if value_cache.shape != key_cache.shape:
        raise ValueError(
            f"key_cache {tuple(key_cache.shape)} and value_cache {tuple(value_cache.shape)} differ in shape"
        )
    if key_cache.shape[2] not in PAGE_SIZES:
        raise ValueError(f"the page size must be one of {PAGE_SIZES}; it is {key_cache.shape[2]}")
    if key_cache.shape[3] % 8 != 0:
        raise ValueError(f"the head size must be a multiple of 8; it is {key_cache.shape[3]}")


def check_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    out: Tensor,
    stats: Tensor | None,
    page_masses: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """The tensors of `paged_attention`: dtypes, devices and layouts, then shapes."""
    integers = (("block_tables", block_tables), ("query_starts", query_starts), ("context_lengths", context_lengths))
    statistics = [(n, t) for n, t in (("stats", stats), ("page_masses", page_masses)) if t is not None]
    check_floats(("query", query), ("out", out))
    check_caches(key_cache, value_cache)
    check_scales(key_cache, key_scales=key_scales, value_scales=value_scales)
    check_dtype(torch.int32, *integers)
    check_dtype(torch.float32, *statistics)
    check_device(query, ("out", out), ("key_cache", key_cache), ("value_cache", value_cache), *integers, *statistics)
    check_dense(("query", query), ("out", out), dims=3, dense=1)
    check_dense(integers[0], dims=2, dense=1)
    check_dense(*integers[1:], dims=1, dense=1)
    check_dense(*statistics, dims=3, dense=3)
    _check_attention_shapes(query, key_cache, block_tables, query_starts, context_lengths)
    expected = {"stats": (*query.shape[:2], NUM_STATS), "page_masses": (*query.shape[:2], block_tables.shape[1])}
    check_shape(("out", out, query.shape), *((name, tensor, expected[name]) for name, tensor in statistics))


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
