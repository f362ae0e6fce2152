"""The peers that the GPU benchmark times compute what we compute: checked on the CPU, where torch's own run too."""

from __future__ import annotations

import pytest
import torch

from pagestream.kernels import bench_cuda_peers, paged_attention


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("peer", ["sdpa", "flex"])
def test_peers_solve_the_same_problem(peer, rows):
    torch.manual_seed(0)
    batch, context, page_size = 2, 100, 16
    pages = -(-context // page_size)
    query = torch.randn(batch, rows, 4, 64)
    keys, values = torch.randn(2, 2 * batch * pages, 2, page_size, 64)
    tables = torch.randperm(2 * batch * pages, dtype=torch.int32).view(2, batch, pages)
    problem = bench_cuda_peers.Problem(query, keys, values, tables, context)
    makers = {
        "sdpa": lambda: bench_cuda_peers.sdpa(problem),
        "flex": lambda: bench_cuda_peers.flex(problem, compiled=False),
    }
    outputs = makers[peer]()()
    starts = torch.arange(batch + 1, dtype=torch.int32) * rows
    lengths = torch.full((batch,), context, dtype=torch.int32)
    for output, pages_of_copy in zip(outputs, tables, strict=True):
        ours = torch.empty(batch * rows, 4, 64)
        paged_attention(query.flatten(0, 1), keys, values, pages_of_copy, starts, lengths, scale=1 / 8, out=ours)
        torch.testing.assert_close(output.flatten(0, 1), ours, rtol=1e-4, atol=1e-4)
