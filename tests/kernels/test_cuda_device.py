"""The CUDA kernels on a real device: what tests/kernels/host_gpu cannot show, and what every implementation is held to
in test_attention.py besides (its `attend` runs on CUDA too)."""

from __future__ import annotations

import itertools

import pytest
import torch

from pagestream.kernels import append_kv, attention_workspace, paged_attention, plan_attention, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 300)
BATCHES = {
    "decode": [(1, n) for n in LENGTHS],
    "mixed": [(1, 2000), (17, 17), (0, 40), (0, 0), (1, 1), (64, 65), (3, 1300)],
    "chunk": [(300, 700), (1, 90)],
}
HEADS = ((6, 2), (8, 1))  # the float64 oracle is what takes time
SHAPES = [*itertools.product(BATCHES, (torch.bfloat16, torch.float16), (64, 80, 96, 128), HEADS, (16, 128))]


class Call:
    """A conftest Batch on the device, its outputs poisoned."""

    def __init__(self, batch, *, stats=True, page_masses=True, scales=(None, None)):
        names = ("query", "key_cache", "value_cache", "block_tables", "query_starts", "context_lengths")
        self.inputs = [getattr(batch, name).cuda() for name in names]
        self.options = {"scale": batch.scale, "window": batch.window}
        self.options |= {
            name: None if scale is None else scale.cuda()
            for name, scale in zip(("key_scales", "value_scales"), scales, strict=True)
        }
        tokens, heads, _ = batch.query.shape
        self.out = torch.full_like(self.inputs[0].contiguous(), float("nan"))
        self.stats = torch.full((tokens, heads, 5), float("nan"), device="cuda") if stats else None
        shape = (tokens, heads, batch.block_tables.shape[1])
        self.page_masses = torch.full(shape, float("nan"), device="cuda") if page_masses else None

    def plan(self, workspace):
        query, key_cache, _, _, starts, lengths = self.inputs
        sizes = {"num_heads": query.shape[1], "num_kv_heads": key_cache.shape[1], "head_size": query.shape[2]}
        plan_attention(starts, lengths, **sizes, window=self.options["window"], workspace=workspace)

    def run(self, workspace=None):
        outputs = {"out": self.out, "stats": self.stats, "page_masses": self.page_masses}
        paged_attention(*self.inputs, **self.options, **outputs, workspace=workspace)
        return self

    def check(self, helpers, batch):
        result = helpers.Result(self.out.float().cpu(), self.stats.cpu(), self.page_masses.cpu())
        helpers.check_against_oracle(batch, result)


@pytest.mark.parametrize(("rows", "dtype", "head_size", "heads", "page_size"), SHAPES)
def test_equals_float64(helpers, rows, dtype, head_size, heads, page_size):
    options = {"dtype": dtype, "head_size": head_size, "heads": heads, "page_size": page_size}
    batch = helpers.random_batch(BATCHES[rows], **options)
    Call(batch).run().check(helpers, batch)


@pytest.mark.parametrize(("rows", "window"), [*itertools.product(BATCHES, (1, 20, 64, 500))])
def test_window_equals_float64(helpers, rows, window):
    batch = helpers.random_batch(BATCHES[rows], dtype=torch.bfloat16, window=window, page_size=16)
    Call(batch).run().check(helpers, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "head_size"), [*itertools.product(BATCHES, (64, 80, 96, 128))])
def test_float8_equals_float64(helpers, rows, head_size, dtype):
    batch, scales = helpers.float8_batch(BATCHES[rows], 0.02, 0.3, head_size=head_size, dtype=dtype)
    Call(batch, scales=scales).run().check(helpers, batch)


def test_long_contexts(helpers):
    """Many blocks share each row; the longest context of the benchmark among short ones."""
    batch = helpers.random_batch([(1, 131072), (1, 5), (1, 20000)], dtype=torch.bfloat16, heads=(4, 1), head_size=128)
    Call(batch).run().check(helpers, batch)


def test_repetition_and_statistics_change_no_bit(helpers):
    """Blocks arrive in another order each time; the sums do not."""
    batch = helpers.random_batch([(1, 9000), (1, 70), (130, 600)], dtype=torch.bfloat16, heads=(8, 2), head_size=128)
    first = Call(batch).run()
    for _ in range(20):
        again = Call(batch).run()
        assert torch.equal(first.out, again.out)
        assert torch.equal(first.stats, again.stats)
        assert torch.equal(first.page_masses, again.page_masses)
    assert torch.equal(first.out, Call(batch, stats=False, page_masses=False).run().out)


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_planned_call_allocates_nothing(helpers, page_size):
    batch = helpers.random_batch([(1, 700), (20, 90)], dtype=torch.bfloat16, page_size=page_size)
    call = Call(batch)
    workspace = attention_workspace(call.inputs[0], page_masses=call.page_masses, page_size=page_size)
    call.plan(workspace)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call.run(workspace)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    call.check(helpers, batch)


def test_page_masses_that_do_not_fit_the_workspace_are_refused(helpers):
    call = Call(helpers.random_batch([(1, 700)], dtype=torch.bfloat16, page_size=64))
    workspace = attention_workspace(call.inputs[0])
    call.plan(workspace)
    with pytest.raises(RuntimeError, match="make it by attention_workspace"):
        call.run(workspace)


def test_one_plan_serves_all_layers_and_a_graph_replays_with_new_lengths(helpers):
    """Captured once with the longest lengths; then lengths change in place, as they do from step to step."""
    batches = [helpers.random_batch([(1, n), (1, m)], dtype=torch.bfloat16) for n, m in ((4000, 4000), (70, 3000))]
    calls = [Call(batch) for batch in batches]
    first, second = calls
    workspace = attention_workspace(first.inputs[0], page_masses=first.page_masses, page_size=64)
    expected = [Call(batch).run().out for batch in batches]
    first.plan(workspace)
    first.run(workspace)  # loads the kernels, which must not happen under capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.plan(workspace)
        for _ in range(3):  # layers
            first.run(workspace)
    graph.replay()
    assert torch.equal(first.out, expected[0])
    for index in (0, 4, 5):  # query, starts, lengths; tables and caches as large as the captured ones
        first.inputs[index].copy_(second.inputs[index])
    pages = second.inputs[1].shape[0]
    first.inputs[1][:pages], first.inputs[2][:pages] = second.inputs[1], second.inputs[2]
    columns = second.inputs[3].shape[1]
    first.inputs[3][:, :columns] = second.inputs[3]
    first.out.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(first.out.float(), expected[1].float(), rtol=2**-7, atol=1e-5)


def test_padded_rows_of_a_graph_are_left_alone(helpers):
    batch = helpers.random_batch([(1, 100), (0, 1), (0, 1)], dtype=torch.bfloat16)
    call = Call(batch)
    call.inputs[5][1:] = 0
    call.run().check(helpers, batch)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("is_float8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_append_equals_the_reference(dtype, is_float8, norm):
    heads = torch.randn(300, 12, 128, device="cuda").to(dtype)
    cache_dtype = torch.float8_e4m3fn if is_float8 else dtype
    angles = torch.rand(300, 64, device="cuda") * 1000
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    weight = torch.rand(10, 128, device="cuda").to(heads.dtype) if norm else None
    slots = torch.randperm(64 * 32, device="cuda")[:300]
    scales = (None, None)
    if is_float8:
        scales = (torch.tensor([0.02, 0.05], device="cuda"), torch.tensor([0.01, 0.5], device="cuda"))
    results = []
    for operator in (append_kv, None):
        mine = heads.clone()
        caches = [torch.zeros(32, 2, 64, 128, device="cuda").to(cache_dtype) for _ in range(2)]
        if operator is None:
            reference.append_kv(mine, cos, sin, weight, 1e-5, *caches, slots, *scales)
        else:
            options = {"norm_weight": weight, "epsilon": 1e-5, "key_scales": scales[0], "value_scales": scales[1]}
            operator(mine, cos, sin, *caches, slots, **options)
        results.append([mine.float(), *(cache.float() for cache in caches)])
    for ours, expected in zip(*results, strict=True):
        step = 2.0**-3 if is_float8 else 2.0**-7
        torch.testing.assert_close(ours, expected, rtol=step, atol=2e-3)
