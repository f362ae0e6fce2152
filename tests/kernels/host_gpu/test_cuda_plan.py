"""The plan of the CUDA attention kernel: every tile of every row block once, in equal contiguous ranges."""

from __future__ import annotations

import itertools
from collections import defaultdict

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TILE, WIDE_ROWS = 64, 64


def expected_tiles(query_length: int, context: int, group: int, window: int) -> list[int]:
    """Tiles of each row block of a sequence, from the definition: those that hold a key that some row attends to."""
    tiles = []
    rows = [context - query_length + i for i in range(query_length) for _ in range(group)]
    for first in range(0, len(rows), WIDE_ROWS):
        block = rows[first : first + WIDE_ROWS]
        begin = max(0, block[0] - window + 1) if window else 0
        tiles.append(len({key // TILE for key in range(begin, block[-1] + 1)}))
    return tiles


sequences = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 700)), min_size=1, max_size=12)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    sequences=sequences,
    group=st.sampled_from((1, 3, 4, 8, 20)),
    kv_heads=st.integers(1, 3),
    window=st.sampled_from((0, 0, 1, 100)),
    num_blocks=st.integers(1, 40),
)
def test_covers_each_tile_once_in_equal_ranges(host_gpu, sequences, group, kv_heads, window, num_blocks):
    new_rows = [q for q, _ in sequences]
    lengths = [q + past for q, past in sequences]
    starts = [0, *itertools.accumulate(new_rows)]
    segments = host_gpu.segments(
        starts, lengths, heads=(group * kv_heads, kv_heads), window=window, num_blocks=num_blocks
    )
    covered, load = defaultdict(list), defaultdict(int)
    for block, sequence, head, row_block, tile, num_tiles, block_tiles in segments:
        assert num_tiles > 0
        covered[sequence, head, row_block, block_tiles].extend(range(tile, tile + num_tiles))
        load[block] += num_tiles
    expected = {
        (s, head, i, tiles): list(range(tiles))
        for s, (q, n) in enumerate(zip(new_rows, lengths, strict=True))
        for head in range(kv_heads)
        for i, tiles in enumerate(expected_tiles(q, n, group, window))
    }
    assert covered == expected
    total = sum(load.values())
    assert len(load) == min(num_blocks, -(-total // 2))  # two tiles are worth a block
    assert not load or max(load.values()) - min(load.values()) <= 1
    assert [s[:4] for s in segments] == sorted(s[:4] for s in segments)  # contiguous: blocks in the order of the list


def test_many_sequences(host_gpu):
    """More sequences than threads in the plan kernel, most of them padding without rows."""
    rows = [1 if i % 3 == 0 else 0 for i in range(1000)]
    starts = [0, *itertools.accumulate(rows)]
    segments = host_gpu.segments(starts, [i % 200 + 1 for i in range(1000)], heads=(2, 1), num_blocks=50)
    assert sum(s[5] for s in segments) == sum((i % 200 + 64) // 64 for i in range(0, 1000, 3))
    assert {s[1] for s in segments} == set(range(0, 1000, 3))
