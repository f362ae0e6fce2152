"""The operators as torch sees them, `store_kv`, and what is refused at the boundary."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pagestream.kernels import append_kv, attention_workspace, build, paged_attention, reference, store_kv


def arguments(batch, *, stats=True):
    t, heads, _ = batch.query.shape
    pages = batch.block_tables.shape[1]
    optional = (torch.empty(t, heads, 5), torch.empty(t, heads, pages)) if stats else (None, None)
    tables = (batch.block_tables, batch.query_starts, batch.context_lengths)
    out = torch.zeros_like(batch.query)
    return (batch.query, batch.key_cache, batch.value_cache, *tables, batch.scale, batch.window, out, *optional, None)


@pytest.mark.parametrize("stats", [False, True])
def test_opcheck_paged_attention(helpers, stats):
    build.load()
    batch = helpers.random_batch([(1, 20), (5, 40)], page_size=16)
    for cache in (batch.key_cache, batch.value_cache):
        cache.nan_to_num_()  # opcheck compares what it must not change, and NaN equals nothing
    torch.library.opcheck(torch.ops.pagestream.paged_attention.default, arguments(batch, stats=stats))


def test_opcheck_store_kv():
    build.load()
    cache = torch.zeros(4, 2, 16, 8)
    rows = torch.randn(3, 2, 8)
    torch.library.opcheck(
        torch.ops.pagestream.store_kv.default, (rows, -rows, cache, -cache, torch.tensor([3, 17, 40]))
    )


def test_opcheck_append_kv():
    build.load()
    heads, caches = torch.randn(3, 8, 8), torch.zeros(2, 4, 2, 16, 8)
    angles, weight = torch.randn(3, 4).repeat(1, 2), torch.rand(6, 8)
    slots = torch.tensor([3, 17, 40])
    for norm in (None, weight):
        arguments = (heads, angles.cos(), angles.sin(), norm, 1e-5, *caches, slots, None, None)
        torch.library.opcheck(torch.ops.pagestream.append_kv.default, arguments)


def test_opcheck_planning():
    """On a CPU there is nothing to plan, in a workspace without elements."""
    build.load()
    query, starts = torch.zeros(3, 4, 64), torch.tensor([0, 1, 3], dtype=torch.int32)
    workspace = attention_workspace(query)
    assert workspace.numel() == 0
    arguments = (starts, starts[1:] + 5, 4, 2, 64, 0, workspace)
    torch.library.opcheck(torch.ops.pagestream.plan_attention.default, arguments)
    torch.library.opcheck(torch.ops.pagestream.attention_workspace_size.default, (query, torch.zeros(3, 4, 2), 64))


def test_fake_tensors_pass_without_data():
    with FakeTensorMode():
        query, cache = torch.empty(5, 4, 64), torch.empty(8, 2, 16, 64)
        tables, starts = torch.empty(2, 3, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
        store_kv(query[:, :2], query[:, 2:], cache, cache.clone(), torch.empty(5, dtype=torch.int64))
        paged_attention(query, cache, cache, tables, starts, starts[1:], scale=1.0, out=torch.empty_like(query))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("operator", [store_kv, reference.store_kv], ids=["operator", "reference"])
@pytest.mark.parametrize("from_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to_dtype", DTYPES, ids=str)
def test_store_kv_writes_its_slots_and_nothing_else(operator, from_dtype, to_dtype):
    storage = torch.randn(6, 2, 3, 16, 24).to(to_dtype)
    expected = storage.clone()
    fused = torch.randn(20, 8, 24).to(from_dtype)
    key, value = fused[:, 1:4], fused[:, 4:7]
    slots = torch.randperm(96)[:20]
    for row, slot in enumerate(slots.tolist()):
        expected[slot // 16, 0, :, slot % 16] = key[row].to(to_dtype)
        expected[slot // 16, 1, :, slot % 16] = value[row].to(to_dtype)
    operator(key, value, storage[:, 0], storage[:, 1], slots)
    assert torch.equal(storage, expected)


@pytest.mark.parametrize("operator", [store_kv, reference.store_kv], ids=["operator", "reference"])
@pytest.mark.parametrize("from_dtype", DTYPES, ids=str)
def test_store_kv_gives_int8_rows_a_scale(operator, from_dtype):
    """Against NumPy; rows of zeros and of one huge number are exact, and NaN and infinity stay visible."""
    codes, scales = torch.full((6, 2, 3, 16, 24), 7, dtype=torch.int8), torch.full((6, 2, 3, 16), 7.0)
    rows = torch.randn(20, 6, 24).mul(torch.logspace(-3, 3, 20)[:, None, None]).to(from_dtype)
    rows[3], rows[4], rows[5, :, 2], rows[6, :, 3] = 0, 0, float("nan"), -float("inf")
    rows[4, :, 7] = -60000
    slots = torch.randperm(96)[:20]
    wanted_codes, wanted_scales = codes.numpy().copy(), scales.numpy().copy()
    for row, slot in zip(rows.float().numpy(), slots.tolist(), strict=True):
        largest = np.abs(row).max(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            inverse = np.where(largest > 0, np.float32(127) / largest, 0).astype(np.float32)
            rounded = np.rint(row * inverse[:, None])
        at = (slot // 16, slice(None), slice(None), slot % 16)
        wanted_codes[at] = np.nan_to_num(rounded, nan=0).reshape(2, 3, 24)
        wanted_scales[at] = (largest / np.float32(127)).reshape(2, 3)
    key, value = rows[:, :3], rows[:, 3:]
    operator(key, value, codes[:, 0], codes[:, 1], slots, key_scales=scales[:, 0], value_scales=scales[:, 1])
    finite = np.isfinite(wanted_scales)
    np.testing.assert_array_equal(scales.numpy(), wanted_scales)
    np.testing.assert_array_equal(codes.numpy()[finite], wanted_codes[finite])


def test_int8_caches_need_their_scales(helpers):
    batch = helpers.int8_batch([(1, 20)], heads=(4, 2), head_size=16, page_size=16)
    call = {**replace(arguments(batch)), "value_scales": batch.value_scales}
    with pytest.raises(ValueError, match="need key_scales and value_scales"):
        paged_attention(**call)
    with pytest.raises(ValueError, match="key_scales must have shape"):
        paged_attention(**call, key_scales=batch.key_scales[:, :1])


@pytest.mark.parametrize("narrow", DTYPES[1:], ids=str)
def test_conversions_equal_torch_for_every_pattern(narrow):
    """All 65,536 bit patterns widened, and their neighbours, ties and overflows narrowed."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(narrow).view(64, 1, 1024)
    wide = patterns.float()
    step = torch.nextafter(wide, torch.full_like(wide, float("inf"))) - wide
    rows = torch.cat([wide, wide + step, wide - step, wide * (1 + 2.0**-9), wide * (1 + 2.0**-12), wide * 1e3])

    def stored(source, dtype):
        cache = torch.zeros(2, -(-len(source) // 16), 1, 16, 1024, dtype=dtype)
        store_kv(source, source, cache[0], cache[1], torch.arange(len(source)))
        return cache[0].reshape(-1, 1, 1024)[: len(source)]

    assert torch.equal(stored(patterns, torch.float32).nan_to_num(7.0), wide.nan_to_num(7.0))
    got, expected = stored(rows, narrow), rows.to(narrow)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


def replace(arguments, **changes):
    names = inspect.signature(paged_attention).parameters
    return {**dict(zip(names, arguments, strict=False)), **changes}  # the last ones are optional


WRONG = {
    "dtype of query": ({"query": torch.zeros(3, 4, 16).double()}, "query and out must share one dtype"),
    "dtypes of caches": ({"value_cache": torch.zeros(5, 2, 16, 16).half()}, "key_cache and value_cache must share"),
    "tables are int64": ({"block_tables": torch.zeros(2, 4, dtype=torch.int64)}, "block_tables must be torch.int32"),
    "device": ({"query_starts": torch.zeros(3, dtype=torch.int32, device="meta")}, "query_starts is on meta"),
    "layout of query": ({"query": torch.zeros(3, 16, 4).transpose(1, 2)}, "the last 1 dimensions of query"),
    "layout of cache": ({"key_cache": torch.zeros(5, 16, 2, 16).transpose(1, 2)}, "the last 2 dimensions of key_cache"),
    "dimensions": ({"query_starts": torch.zeros(1, 3, dtype=torch.int32)}, "query_starts must have 1 dimensions"),
    "page size": ({k: torch.zeros(5, 2, 24, 16) for k in ("key_cache", "value_cache")}, "page size must be one of"),
    "head size": ({k: torch.zeros(5, 2, 16, 12) for k in ("key_cache", "value_cache")}, "multiple of 8"),
    "KV heads": ({k: torch.zeros(5, 3, 16, 16) for k in ("key_cache", "value_cache")}, "multiple of 3 KV heads"),
    "sequences": ({"query_starts": torch.zeros(2, dtype=torch.int32)}, "context_lengths has 2 sequences"),
    "out": ({"out": torch.zeros(4, 4, 16)}, "out must have shape"),
    "stats": ({"stats": torch.zeros(3, 4, 4)}, "stats must have shape"),
    "page masses": ({"page_masses": torch.zeros(3, 4, 9)}, "page_masses must have shape"),
    "window": ({"window": -1}, "0 means no window"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_by_name(helpers, name):
    changes, message = WRONG[name]
    batch = helpers.random_batch([(1, 20), (2, 30)], heads=(4, 2), head_size=16, page_size=16)
    with pytest.raises(ValueError, match=message):
        paged_attention(**replace(arguments(batch), **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.block_tables[1].fill_(99), "sequence 1: page id 99 at entry 0"),
        (lambda b: b.block_tables[0, 1].fill_(-1), "sequence 0: page id -1 at entry 1"),
        (lambda b: b.context_lengths[0].fill_(1000), "sequence 0: 1 new rows of 1000 cached tokens"),
        (lambda b: b.context_lengths[1].fill_(1), "sequence 1: 2 new rows of 1 cached"),
        (lambda b: b.query_starts[2].fill_(4), "sequence 1: query_starts point outside the 3 rows"),
    ],
)
def test_contents_that_point_outside_raise_instead_of_crashing(cpp_attend, helpers, change, message):
    batch = helpers.random_batch([(1, 20), (2, 30)], heads=(4, 2), head_size=16, page_size=16)
    change(batch)
    with pytest.raises(ValueError, match=message):
        cpp_attend(batch)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("head_size", [8, 80])
@pytest.mark.parametrize("to_dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("from_dtype", DTYPES, ids=str)
def test_append_kv_normalises_rotates_and_stores_as_the_reference(from_dtype, to_dtype, head_size, norm):
    torch.manual_seed(0)
    projected = torch.randn(130, 7, head_size).to(from_dtype)
    cos, sin = torch.randn(2, 130, head_size)
    weight = torch.rand(5, head_size).to(from_dtype) if norm else None
    slots = torch.randperm(9 * 16)[:130]
    results = []
    for append in (torch.ops.pagestream.append_kv.default, reference.append_kv):
        build.load()
        heads = projected.clone()[:, :6]  # rows are not adjacent
        caches = torch.full((9, 2, 16 * 2, head_size), 3).to(to_dtype).unflatten(2, (2, 16)).unbind(2)
        scales = torch.full((2, 9, 2, 16), 3.0).unbind() if to_dtype == torch.int8 else (None, None)
        append(heads, cos, sin, None if weight is None else weight[:4], 1e-5, *caches, slots, *scales)
        results.append([heads.float(), *(cache.float() for cache in caches), *scales])
    step = max(torch.finfo(from_dtype).eps, 2**-22 if to_dtype == torch.int8 else torch.finfo(to_dtype).eps)
    for ours, expected in zip(*results, strict=True):
        if ours is not None:
            is_codes = to_dtype == torch.int8 and ours is not results[0][0] and ours.dim() == 4
            torch.testing.assert_close(ours, expected, rtol=step, atol=1 if is_codes else 1e-5)


def test_a_slot_outside_the_cache_raises():
    rows, cache = torch.zeros(2, 1, 8), torch.zeros(2, 1, 16, 8)
    with pytest.raises(ValueError if build.load().implementation == "cpp" else IndexError, match="2"):
        store_kv(rows, rows, cache, cache.clone(), torch.tensor([0, 32]))
    with pytest.raises(ValueError if build.load().implementation == "cpp" else IndexError, match="2"):
        append_kv(rows.repeat(1, 3, 1), rows[:, 0], rows[:, 0], cache, cache.clone(), torch.tensor([0, 32]))
