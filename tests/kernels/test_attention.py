"""Every implementation against float64, on the shapes where paging, tiling and splitting have their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 1000)
DECODES = [(1, n) for n in LENGTHS]
MIXED = [(1, 300), (17, 17), (1, 1), (64, 65), (5, 1000), (130, 400), (2, 257)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CASES = {
    "decode": (DECODES, {}),
    "mixed": (MIXED, {}),
    "page 16, group 1": (MIXED, {"heads": (3, 3), "page_size": 16}),
    "page 32, group 3, D 80": (DECODES, {"heads": (9, 3), "page_size": 32, "head_size": 80}),
    "page 128, group 8, D 128": (MIXED, {"heads": (8, 1), "page_size": 128, "head_size": 128}),
    "group 5, D 96": (DECODES, {"heads": (5, 1), "head_size": 96}),
    "group 130: more than a block of rows": ([(3, 70), (1, 300)], {"heads": (130, 1), "head_size": 16}),
    "group 130, D 64": ([(2, 70)], {"heads": (130, 1)}),
    "negative scale": (MIXED, {"scale": -0.2}),
    "D 16": (MIXED, {"heads": (4, 2), "head_size": 16, "page_size": 16}),
    "D 24: not a multiple of a vector": (MIXED, {"heads": (4, 2), "head_size": 24}),
    "window 1": (MIXED, {"window": 1}),
    "window 60": (MIXED, {"window": 60, "page_size": 16}),
    "window 300, page 128": (MIXED, {"window": 300, "page_size": 128}),
    "window longer than any context": (MIXED, {"window": 5000}),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in CASES for dtype in (DTYPES[:1] if name.startswith("window") else DTYPES)],
    ids=str,
)
def test_equals_float64(attend, helpers, name, dtype):
    rows, options = CASES[name]
    batch = helpers.random_batch(rows, dtype=dtype, **options)
    helpers.check_against_oracle(batch, attend(batch))


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float16], ids=str)
def test_cache_may_be_narrower_than_query(attend, helpers, query_dtype):
    """Statistics keep the float32 tolerance: scores see all of a wide query."""
    batch = helpers.random_batch([(3, 100), (60, 600)], dtype=torch.bfloat16, query_dtype=query_dtype)
    helpers.check_against_oracle(batch, attend(batch))


@pytest.mark.parametrize(
    "name",
    ["decode", "mixed", "page 128, group 8, D 128", "negative scale", "D 24: not a multiple of a vector", "window 60"],
)
def test_int8_caches_equal_float64(attend, helpers, name):
    rows, options = CASES[name]
    batch = helpers.int8_batch(rows, **options)
    helpers.check_against_oracle(batch, attend(batch))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 330)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_size=st.sampled_from((8, 16, 40, 64)),
    page_size=st.sampled_from((16, 32, 64, 128)),
    window=st.sampled_from((0, 0, 3, 70, 256)),
    seed=st.integers(0, 99),
)
def test_any_batch_equals_float64(attend, helpers, rows, kv_heads, group, head_size, page_size, window, seed):
    rows = [(min(new, cached), cached) for new, cached in rows]
    batch = helpers.random_batch(
        rows, heads=(kv_heads * group, kv_heads), head_size=head_size, page_size=page_size, window=window, seed=seed
    )
    helpers.check_against_oracle(batch, attend(batch))


@pytest.mark.parametrize("offset", [300.0, -300.0])
def test_huge_scores(attend, helpers, offset):
    """Scores around +-300 with a spread of about 1: the shifted accumulators keep the digits."""
    batch = helpers.random_batch([(1, 1000), (40, 130)], head_size=64)
    keys = [torch.cat([k[..., :-1] / 2, torch.ones_like(k[..., :1])], -1) for k in batch.keys]
    query = batch.query.clone()
    query[..., -1] = offset / batch.scale
    shifted = helpers.pack([query[:1], query[1:]], keys, batch.values)
    result, expected = attend(shifted), shifted
    helpers.check_against_oracle(expected, result)
    flat = attend(
        helpers.pack(
            [query.index_fill(2, torch.tensor(63), 0)[i] for i in (slice(1), slice(1, 41))], keys, batch.values
        )
    )
    helpers.compare("entropy", result.stats[..., 1], flat.stats[..., 1], 1e-4)


def test_equal_scores_have_entropy_log_n(attend, helpers):
    for n in (1, 2, 63, 64, 65, 256, 257, 1000, 4096):
        keys, values = torch.zeros(n, 1, 16), torch.randn(n, 1, 16)
        result = attend(helpers.pack([torch.randn(1, 2, 16)], [keys], [values]))
        helpers.compare(f"entropy of {n}", result.stats[0, :, 1], [math.log(n)] * 2, 1e-6 * max(1, math.log(n)))
        helpers.compare("p_max", result.stats[0, :, 2], [1 / n] * 2, 1e-7)
        helpers.compare("out", result.out[0, 0], values[:, 0].double().mean(0), 1e-5)


def test_one_dominant_key_has_entropy_zero(attend, helpers):
    keys = torch.zeros(500, 1, 16)
    keys[77] = 100
    result = attend(helpers.pack([torch.ones(1, 1, 16)], [keys], [torch.randn(500, 1, 16)]))
    assert result.stats[0, 0, 1].item() == 0
    assert result.stats[0, 0, 2].item() == 1


@pytest.mark.parametrize("window", [0, 100])
def test_page_masses_sum_to_one_and_are_zero_beyond(attend, helpers, window):
    batch = helpers.random_batch(MIXED, page_size=16, window=window)
    masses = attend(batch).page_masses
    helpers.compare("sum", masses.double().sum(-1), np.ones(masses.shape[:2]), 1e-5)
    for s, (begin, end) in enumerate(zip(batch.query_starts[:-1], batch.query_starts[1:], strict=True)):
        assert (masses[begin:end, :, -(-int(batch.context_lengths[s]) // 16) :] == 0).all()


def test_chain_rule_of_entropy_over_pages(attend, helpers):
    """H = H(page masses) + sum of mass x H within the page, all from the operator itself."""
    batch = helpers.random_batch([(1, 300)], page_size=32)
    whole = attend(batch)
    keys, values = batch.keys[0].split(32), batch.values[0].split(32)
    parts = attend(helpers.pack([batch.query] * len(keys), keys, values, page_size=32))
    masses = whole.page_masses[0, :, : len(keys)].double()  # [Hq, pages]
    within = parts.stats[..., 1].double().T
    total = torch.special.entr(masses).sum(-1) + (masses * within).sum(-1)
    helpers.compare("entropy", whole.stats[0, :, 1], total, 1e-5)
    log_sums = torch.logsumexp(parts.stats[..., 0].double(), 0)
    helpers.compare("lse", whole.stats[0, :, 0], log_sums, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_do_not_change_a_bit_of_the_output(attend, helpers, dtype):
    for window in (0, 90):
        batch = helpers.random_batch(MIXED, dtype=dtype, window=window)
        plain = attend(batch, stats=False, page_masses=False).out
        for stats, page_masses in ((True, False), (False, True), (True, True)):
            assert torch.equal(attend(batch, stats=stats, page_masses=page_masses).out, plain)


def test_a_nan_stays_in_its_sequence(attend, helpers):
    batch = helpers.random_batch([(1, 70), (1, 70)])
    clean = attend(batch)
    batch.key_cache[batch.block_tables[0, 0], 0, 3, 0] = float("nan")
    result = attend(batch)
    assert result.out[0, :3].isnan().all()
    assert torch.equal(result.out[1], clean.out[1])


def test_compare_names_the_worst_element(helpers):
    with pytest.raises(AssertionError, match=r"x\[1, 2\]: 3.0, expected 0.0"):
        helpers.compare("x", [[0, 0, 0], [1, 0, 3.0]], np.zeros((2, 3)), 0.5)
    with pytest.raises(AssertionError, match=r"x\[1\]: nan, expected 1.0"):
        helpers.compare("x", [0, float("nan")], [0, 1], 9)
    with pytest.raises(AssertionError, match=r"x\[0\]: inf, expected -inf"):
        helpers.compare("x", [float("inf")], [-float("inf")], 9)
    helpers.compare("x", [float("nan"), float("inf")], [float("nan"), float("inf")], 0)
