"""The append kernel's source, executed on this CPU: norm, rotation, rounding, and nothing written but its slots."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

PAGES, PAGE_SIZE, TOKENS = 5, 16, 9
FLOAT8 = torch.float8_e4m3fn
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, FLOAT8),
    (torch.float16, FLOAT8),
]  # of heads and cache
CASES = [(*dtypes, *rest) for dtypes, *rest in itertools.product(DTYPES, (64, 80, 96, 128), (False, True))]


def expected_rotation(heads, cos, signed_sin, norm_weight, epsilon):
    """Float64 from the definitions."""
    x = heads.double().numpy()
    if norm_weight is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * norm_weight.double().numpy()
    angle_cos, angle_sin = (t.double().numpy()[:, None] for t in (cos, signed_sin))
    return x * angle_cos + np.roll(x, x.shape[-1] // 2, axis=-1) * angle_sin


def inputs(dtype, cache_dtype, head_size, *, norm):
    torch.manual_seed(head_size)
    angles = torch.rand(TOKENS, head_size // 2) * 100
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    signed_sin = torch.cat((-angles.sin(), angles.sin()), -1)
    heads = torch.randn(TOKENS, 6 + 2 * 2, head_size).to(dtype)
    weight = torch.rand(6 + 2, head_size).to(heads.dtype) if norm else None
    caches = tuple(torch.full((PAGES, 2, PAGE_SIZE, head_size), float("nan")).to(cache_dtype) for _ in range(2))
    slots = torch.randperm(PAGES * PAGE_SIZE)[:TOKENS]
    return heads, cos, signed_sin, weight, caches, slots


@pytest.mark.parametrize(("dtype", "cache_dtype", "head_size", "norm"), CASES)
def test_equals_float64(host_gpu, helpers, dtype, cache_dtype, head_size, norm):
    heads, cos, signed_sin, weight, caches, slots = inputs(dtype, cache_dtype, head_size, norm=norm)
    original, slots[3] = heads.clone(), -1  # padding: rotated, not stored
    scales = (torch.tensor([0.02, 0.05]), torch.tensor([0.01, 0.5])) if cache_dtype == FLOAT8 else (None, None)
    host_gpu.append(heads, cos, signed_sin, caches, slots, norm_weight=weight, epsilon=1e-5, scales=scales)
    rotated = expected_rotation(original[:, :8], cos, signed_sin, weight, 1e-5)
    rounding = 2.0**-8 if heads.dtype == torch.bfloat16 else 2.0**-11
    helpers.compare("query", heads[:, :6].float(), rotated[:, :6], rounding * np.abs(rotated[:, :6]) + 1e-6)
    assert torch.equal(heads[:, 6:], original[:, 6:])
    stored_slots = [i for i in range(TOKENS) if i != 3]
    for cache, exact, scale in zip(caches, (rotated[:, 6:], original[:, 8:].double().numpy()), scales, strict=True):
        flat = cache.float().transpose(1, 2).flatten(0, 1)  # [slots, Hkv, D]
        unit = np.ones(2) if scale is None else scale.double().numpy()
        wanted = np.clip(exact / unit[:, None], -448, 448) if scale is not None else exact
        tolerance = 2.0**-4 * np.abs(wanted) + 2.0**-10 if scale is not None else rounding * np.abs(wanted) + 1e-6
        helpers.compare("stored", flat[slots[stored_slots]], wanted[stored_slots], tolerance[stored_slots])
        untouched = torch.ones(PAGES * PAGE_SIZE, dtype=torch.bool)
        untouched[slots[stored_slots]] = False
        assert flat[untouched].isnan().all()


def test_float8_rounds_as_torch_does(host_gpu):
    """Every representable number, every midpoint and its neighbours, and what lies beyond 448."""
    codes = torch.arange(128, dtype=torch.uint8)[:127].view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((codes, middles, middles * (1 - 2**-7), middles * (1 + 2**-7), torch.tensor([449.0, 1e4])))
    values = torch.cat((near, -near)).bfloat16()
    values = torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 1, 64)
    tokens = len(values)
    heads = torch.cat((torch.zeros(tokens, 2, 64).bfloat16(), values), 1)
    caches = tuple(torch.zeros(2, 1, 16, 64).to(torch.float8_e4m3fn) for _ in range(2))
    angles = torch.zeros(tokens, 64)
    host_gpu.append(heads, angles + 1, angles, caches, torch.arange(tokens))
    expected = values[:, 0].float().clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(caches[1].flatten(0, 2)[:tokens].view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("dtype", "cache_dtype"), DTYPES, ids=str)
def test_operator_on_the_cpu_agrees(host_gpu, helpers, dtype, cache_dtype, norm):
    """`append_kv` without a GPU runs the reference: the two implementations of one contract."""
    from pagestream.kernels import append_kv

    heads, cos, signed_sin, weight, caches, slots = inputs(dtype, cache_dtype, 64, norm=norm)
    scales = (torch.tensor([0.02, 0.05]), torch.tensor([0.01, 0.5])) if cache_dtype == FLOAT8 else (None, None)
    ours, our_caches = heads.clone(), tuple(c.clone() for c in caches)
    host_gpu.append(ours, cos, signed_sin, our_caches, slots, norm_weight=weight, epsilon=1e-5, scales=scales)
    append_kv(
        heads,
        cos,
        signed_sin,
        *caches,
        slots,
        norm_weight=weight,
        epsilon=1e-5,
        key_scales=scales[0],
        value_scales=scales[1],
    )
    step = {
        torch.bfloat16: 2.0**-7,
        torch.float16: 2.0**-10,
        FLOAT8: 2.0**-3,
    }  # one unit in the last place
    torch.testing.assert_close(ours.float(), heads.float(), rtol=step[heads.dtype], atol=1e-6)
    for our_cache, cache in zip(our_caches, caches, strict=True):
        torch.testing.assert_close(our_cache.float(), cache.float(), rtol=step[cache_dtype], atol=2e-3, equal_nan=True)
