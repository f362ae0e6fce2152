"""The operator between a layer's projections and its attention; served as those in operators.py are."""

from __future__ import annotations

import torch
from torch import Tensor

from pagestream.kernels import reference
from pagestream.kernels.checks import (
    FLOAT8,
    check_caches,
    check_dense,
    check_device,
    check_dtype,
    check_floats,
    check_scales,
    check_shape,
)
from pagestream.kernels.operators import gpu_takes, load_kernels

_MAX_GPU_HEAD_SIZE = 256

torch.library.define(
    "pagestream::append_kv",
    "(Tensor(a!) heads, Tensor cos, Tensor signed_sin, Tensor? norm_weight, float epsilon, Tensor(b!) key_cache, "
    "Tensor(c!) value_cache, Tensor slots, Tensor? key_scales, Tensor? value_scales) -> ()",
)
torch.library.impl("pagestream::append_kv", "CompositeExplicitAutograd", reference.append_kv)


def _nothing_to_shape(*_args: object) -> None:
    """Fake implementation: everything is written in place."""


torch.library.register_fake("pagestream::append_kv", _nothing_to_shape)


def append_kv(
    heads: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Normalise and rotate the query and key heads of new rows; store keys and values; leave the query in `heads`.

    `heads` `[T, Hq + 2 Hkv, D]`: projected query, key and value heads; the query heads are replaced, the others left as
    they are. `cos`, `signed_sin` float32 `[T, D]`: dimension i becomes x_i cos_i + x_j signed_sin_i with j = (i + D/2)
    mod D. `norm_weight` `[Hq + Hkv, D]` in the dtype of `heads`: the weights of an RMS norm before that (Qwen 3), whose
    epsilon is `epsilon`. Caches `[P, Hkv, B, D]`, `slots` int64 `[T]` as in `store_kv`, but on CUDA a slot outside
    the cache is skipped. Caches of float8_e4m3fn receive keys and values divided by `key_scales` and `value_scales`,
    float32 `[Hkv]`, 1 by default, and cut off at 448; caches of int8 receive what `store_kv` writes. Arithmetic in
    float32, rounded once.

    Raises ValueError for a wrong dtype, device, layout or shape.
    """
    check_floats(("heads", heads), ("heads", heads))
    check_dtype(torch.float32, ("cos", cos), ("signed_sin", signed_sin))
    check_dtype(torch.int64, ("slots", slots))
    check_caches(key_cache, value_cache)
    check_scales(key_cache, key_scales=key_scales, value_scales=value_scales)
    flat = (("cos", cos), ("signed_sin", signed_sin))
    weights = [] if norm_weight is None else [("norm_weight", norm_weight)]
    check_device(heads, *flat, *weights, ("key_cache", key_cache), ("value_cache", value_cache), ("slots", slots))
    check_dtype(heads.dtype, *weights)
    check_dense(("heads", heads), dims=3, dense=1)
    check_dense(*flat, *weights, dims=2, dense=2)
    check_dense(("slots", slots), dims=1, dense=1)
    tokens, num_heads, head_size = heads.shape
    num_kv_heads = key_cache.shape[1]
    check_shape(*((name, tensor, (tokens, head_size)) for name, tensor in flat), ("slots", slots, (tokens,)))
    check_shape(*((name, tensor, (num_heads - num_kv_heads, head_size)) for name, tensor in weights))
    if num_heads <= 2 * num_kv_heads or head_size != key_cache.shape[3]:
        raise ValueError(f"heads {tuple(heads.shape)} and caches {tuple(key_cache.shape)} do not belong together")
    load_kernels(heads)
    operator = torch.ops.pagestream.append_kv.default if _has_kernel(heads, key_cache) else reference.append_kv
    operator(heads, cos, signed_sin, norm_weight, epsilon, key_cache, value_cache, slots, key_scales, value_scales)


def _has_kernel(heads: Tensor, key_cache: Tensor) -> bool:
    if not heads.is_cuda:
        return key_cache.dtype != FLOAT8
    return gpu_takes(heads.dtype, key_cache.dtype) and heads.shape[2] <= _MAX_GPU_HEAD_SIZE
