"""The C++ kernels promise bits: a row depends on its own query and context alone, not on who shares the step."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch


def same(a, b):
    return torch.equal(a.out, b.out) and torch.equal(a.stats, b.stats)


def rows_of(batch, sequence, rows):
    """The batch that computes only some of the new rows of one sequence, at their positions."""
    begin, end = batch.query_starts[sequence].item(), batch.query_starts[sequence + 1].item()
    length = batch.context_lengths[sequence].item() - (end - begin) + rows.stop
    return dataclasses.replace(
        batch,
        query=batch.query[begin + rows.start : begin + rows.stop],
        block_tables=batch.block_tables[sequence : sequence + 1],
        query_starts=torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
        context_lengths=torch.tensor([length], dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("dtype", "query_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.int8, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [0, 150])
@pytest.mark.parametrize(("head_size", "heads"), [(64, (9, 3)), (80, (6, 2)), (128, (17, 1))])
def test_alone_in_a_batch_and_in_any_chunks(cpp_attend, helpers, dtype, query_dtype, window, head_size, heads):
    lengths = [(1, 900), (300, 700), (1, 3), (40, 40)]
    options = {"query_dtype": query_dtype, "window": window, "head_size": head_size, "heads": heads, "page_size": 32}
    if dtype == torch.int8:
        batch = helpers.int8_batch(lengths, **options)
    else:
        batch = helpers.random_batch(lengths, dtype=dtype, **options)
    together = cpp_attend(batch)
    for sequence, (new, _) in enumerate(lengths):
        begin = int(batch.query_starts[sequence])
        for cuts in ([0, new], [0, 1, new], [0, new // 3, new // 2, new], [*range(0, new, 7), new]):
            for start, stop in itertools.pairwise(cuts):
                alone = cpp_attend(rows_of(batch, sequence, slice(start, stop)))
                rows = slice(begin + start, begin + stop)
                assert torch.equal(alone.out, together.out[rows]), (sequence, start, stop)
                assert torch.equal(alone.stats, together.stats[rows]), (sequence, start, stop)
                assert torch.equal(alone.page_masses, together.page_masses[rows]), (sequence, start, stop)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 5, 8, 16])
def test_few_rows_have_the_bits_of_many(cpp_attend, helpers, group, head_size):
    """One row, and a few at once as speculation has them: up to 4, 8, 16 and more rows of a KV head."""
    batch = helpers.random_batch(
        [(40, 600)],
        dtype=torch.bfloat16,
        query_dtype=torch.float32,
        heads=(group, 1),
        head_size=head_size,
        page_size=16,
    )
    together = cpp_attend(batch)
    for start, stop in ((39, 40), (10, 11), (30, 32), (20, 24), (7, 12)):
        alone = cpp_attend(rows_of(batch, 0, slice(start, stop)))
        assert torch.equal(alone.out, together.out[start:stop])
        assert torch.equal(alone.stats, together.stats[start:stop])
        assert torch.equal(alone.page_masses, together.page_masses[start:stop])


def test_any_number_of_threads_and_any_page_size(cpp_attend, helpers):
    """Threads cut blocks at other splits, pages move the rows: neither reaches a bit."""
    lengths = [(1, 3000), (1, 40), (70, 900)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5, 8):
            torch.set_num_threads(count)
            results += [cpp_attend(helpers.random_batch(lengths, page_size=size)) for size in (16, 128)]
    finally:
        torch.set_num_threads(threads)
    assert all(same(results[0], result) for result in results[1:])


def test_runs_are_repeatable(cpp_attend, helpers):
    batch = helpers.random_batch([(1, 2000), (33, 500)])
    first = cpp_attend(batch)
    assert all(same(first, cpp_attend(batch)) for _ in range(5))
