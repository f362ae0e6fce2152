"""The CUDA attention kernel's source, executed on this CPU, against float64, at edges of pages, tiles and splits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130)
BATCHES = {
    "decode": [(1, n) for n in LENGTHS],
    "mixed": [(1, 200), (17, 17), (0, 40), (0, 0), (1, 1), (64, 65), (3, 130)],
    "chunk": [(70, 150)],
}
HEADS = ((2, 2), (6, 2), (8, 1))
CASES = [
    *itertools.product(BATCHES, (torch.bfloat16, torch.float16), (64, 80, 96, 128), HEADS, (16, 64)),
    *itertools.product(("mixed",), (torch.bfloat16,), (64, 128), HEADS, (32, 128)),
]
FLOAT8_CASES = [
    *itertools.product(BATCHES, (torch.bfloat16, torch.float16), (64, 80, 96, 128), (16, 64)),
    *itertools.product(("mixed",), (torch.bfloat16, torch.float16), (64, 128), (32, 128)),
]
WINDOWS = [*itertools.product(BATCHES, (1, 20, 64, 500), (16, 128))]


def check(host_gpu, helpers, batch, **options):
    out, stats, masses = host_gpu.attend(batch, stats=True, page_masses=True, **options)
    helpers.check_against_oracle(batch, helpers.Result(out.float(), stats, masses))
    return out


@pytest.mark.parametrize(("rows", "dtype", "head_size", "heads", "page_size"), CASES)
def test_equals_float64(host_gpu, helpers, rows, dtype, head_size, heads, page_size):
    options = {"dtype": dtype, "head_size": head_size, "heads": heads, "page_size": page_size}
    check(host_gpu, helpers, helpers.random_batch(BATCHES[rows], **options))


@pytest.mark.parametrize(("rows", "window", "page_size"), WINDOWS)
def test_window_equals_float64(host_gpu, helpers, rows, window, page_size):
    batch = helpers.random_batch(BATCHES[rows], dtype=torch.bfloat16, window=window, page_size=page_size)
    check(host_gpu, helpers, batch)


@pytest.mark.parametrize("heads", [(16, 1), (17, 1), (70, 1), (5, 1)], ids=str)
def test_groups_of_any_size(host_gpu, helpers, heads):
    batch = helpers.random_batch([(1, 100), (3, 70)], dtype=torch.bfloat16, heads=heads)
    check(host_gpu, helpers, batch)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 8, 33])
def test_any_number_of_blocks(host_gpu, helpers, num_blocks):
    """From no split at all to a split of every tile; the order in which blocks run and arrive changes no bit."""
    batch = helpers.random_batch([(1, 700), (40, 300), (1, 64)], dtype=torch.bfloat16, heads=(4, 2))
    first = check(host_gpu, helpers, batch, num_blocks=num_blocks, seed=1)
    assert torch.equal(first, check(host_gpu, helpers, batch, num_blocks=num_blocks, seed=2))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("rows", BATCHES)
def test_statistics_change_no_bit(host_gpu, helpers, rows, page_size):
    batch = helpers.random_batch(BATCHES[rows], dtype=torch.float16, page_size=page_size, window=90)
    off, no_stats, no_masses = host_gpu.attend(batch, stats=False, page_masses=False)
    assert no_stats is None
    assert no_masses is None
    heads, stats, _ = host_gpu.attend(batch, stats=True, page_masses=False)
    pages, stats_beside_pages, masses = host_gpu.attend(batch, stats=True, page_masses=True)
    only_pages, _, only_masses = host_gpu.attend(batch, stats=False, page_masses=True)
    for out in (heads, pages, only_pages):
        assert torch.equal(off, out)
    assert torch.equal(stats, stats_beside_pages)
    assert torch.equal(masses, only_masses)
    assert not off.isnan().any()


@pytest.mark.parametrize("is_float8", [False, True])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_kernel_without_statistics_gives_the_same_bits(host_gpu, helpers, dtype, head_size, is_float8):
    options = {"dtype": dtype, "head_size": head_size}
    rows = [(1, 130), (20, 70)]
    batch, scales = helpers.random_batch(rows, **options), (None, None)
    if is_float8:
        batch, scales = helpers.float8_batch(rows, 0.02, 0.3, **options)
    off, *_ = host_gpu.attend(batch, stats=False, page_masses=False, scales=scales)
    on, *_ = host_gpu.attend(batch, stats=True, page_masses=True, scales=scales)
    assert torch.equal(off, on)
    assert not off.isnan().any()


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_flat_and_peaked_weights(host_gpu, helpers, scale):
    """Scale 30 makes scores of several hundred: weights of all but one key vanish, and shifts move by hundreds."""
    batch = helpers.random_batch([(1, 300), (20, 90)], dtype=torch.bfloat16, scale=scale)
    check(host_gpu, helpers, batch)


def test_equal_scores_have_the_entropy_of_their_number(host_gpu, helpers):
    batch = helpers.random_batch([(1, n) for n in LENGTHS], dtype=torch.bfloat16, scale=0.0)
    _, stats, _ = host_gpu.attend(batch, stats=True, page_masses=False)
    expected = torch.tensor([math.log(n) for n in LENGTHS])[:, None].expand(-1, stats.shape[1])
    torch.testing.assert_close(stats[..., 1], expected, atol=1e-6, rtol=0)


def test_scores_that_grow_along_the_sequence(host_gpu, helpers):
    """The shift follows the maximum late (by up to 8 in log2): every key raises the score a little."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(64, generator=generator)
    keys = (torch.arange(400)[:, None, None] / 40 * direction).bfloat16()
    values = torch.randn(400, 1, 64, generator=generator).bfloat16()
    batch = helpers.pack([direction.expand(1, 4, 64).bfloat16()], [keys], [values], scale=0.02)
    check(host_gpu, helpers, batch)


@pytest.mark.parametrize(("rows", "dtype", "head_size", "page_size"), FLOAT8_CASES)
def test_float8_cache_equals_float64(host_gpu, helpers, rows, dtype, head_size, page_size):
    """Products are of fp16, which holds e4m3 exactly, so only weights and the query's smallest bits are rounded."""
    options = {"dtype": dtype, "head_size": head_size, "page_size": page_size}
    batch, scales = helpers.float8_batch(BATCHES[rows], 0.02, 0.3, **options)
    check(host_gpu, helpers, batch, scales=scales)


def test_float8_without_scales(host_gpu, helpers):
    batch, _ = helpers.float8_batch([(1, 100), (20, 50)], 1.0, 1.0, heads=(4, 1))
    check(host_gpu, helpers, batch)
