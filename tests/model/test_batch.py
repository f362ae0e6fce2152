from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.batch import Batch, build_batch
from pagestream.model.step import Chunk, SamplingParams, StepPlan

CPU = torch.device("cpu")


@st.composite
def plans(draw: st.DrawFn) -> tuple[StepPlan, int]:
    page_size = draw(st.sampled_from([1, 4, 16]))
    pages = draw(st.permutations(range(200)))
    chunks = []
    for index in range(draw(st.integers(1, 6))):
        tokens = draw(st.lists(st.integers(0, 2**17), min_size=1, max_size=40))
        start = draw(st.integers(0, len(tokens) - 1))
        prompt = draw(st.sampled_from([len(tokens), start])) or len(tokens)
        length = draw(st.integers(1, len(tokens) - start))
        needed = -(-(start + length) // page_size)
        spare = draw(st.integers(0, 2))
        blocks, pages = pages[: needed + spare], pages[needed + spare :]
        if len(blocks) >= needed:
            chunks.append(Chunk(str(index), tokens, prompt, start, length, blocks, SamplingParams()))
    return StepPlan(tuple(sorted(chunks, key=lambda chunk: chunk.start < chunk.num_prompt_tokens))), page_size


@given(plans().filter(lambda drawn: drawn[0].chunks))
@settings(deadline=None)
def test_rows_are_the_chunks_end_to_end(drawn: tuple[StepPlan, int]) -> None:
    plan, page_size = drawn
    batch = build_batch(plan, page_size, CPU)
    token_ids, positions, slots, starts, last_rows = [], [], [], [0], []
    for chunk in plan.chunks:
        for position in range(chunk.start, chunk.start + chunk.length):
            token_ids.append(chunk.tokens[position])
            positions.append(position)
            slots.append(chunk.block_ids[position // page_size] * page_size + position % page_size)
        starts.append(len(token_ids))
        if chunk.start + chunk.length == len(chunk.tokens):
            last_rows.append(len(token_ids) - 1)
    assert batch.token_ids.tolist() == token_ids
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert batch.query_starts.tolist() == starts
    assert batch.context_lengths.tolist() == [chunk.end for chunk in plan.chunks]
    assert batch.sampled_rows.tolist() == last_rows
    assert batch.prefill_rows == sum(chunk.length for chunk in plan.chunks if chunk.start < chunk.num_prompt_tokens)
    for row, chunk in zip(batch.block_tables.tolist(), plan.chunks, strict=True):
        needed = -(-chunk.end // page_size)
        assert row[:needed] == list(chunk.block_ids[:needed])


@given(plans().filter(lambda drawn: drawn[0].chunks), st.data())
@settings(deadline=None)
def test_a_batch_that_is_filled_again_is_as_good_as_a_new_one(drawn: tuple[StepPlan, int], data: st.DataObject) -> None:
    """Other numbers of the same shape, also behind a batch of another shape."""
    plan, page_size = drawn
    shuffled = tuple(
        replace(
            chunk,
            tokens=data.draw(st.permutations(chunk.tokens)),
            block_ids=data.draw(st.permutations(chunk.block_ids)),
            output_stats=data.draw(st.booleans()),
        )
        for chunk in plan.chunks
    )
    batch = None
    for step in (plan.chunks[:1], plan.chunks, shuffled, plan.chunks, plan.chunks):
        batch = build_batch(StepPlan(step), page_size, CPU, batch)
        assert_same(batch, build_batch(StepPlan(step), page_size, CPU))
    assert build_batch(plan, page_size, CPU, batch) is batch


def assert_same(batch: Batch, other: Batch) -> None:
    for name in ("token_ids", "positions", "slots", "query_starts", "context_lengths", "block_tables", "sampled_rows"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    assert batch.prefill_rows == other.prefill_rows
    mine, theirs = batch.with_statistics, other.with_statistics
    assert (mine is None) == (theirs is None)
    assert mine is None or theirs is None or torch.equal(mine, theirs)


def test_types_are_those_of_the_kernels() -> None:
    batch = build_batch(StepPlan((Chunk("a", [1, 2, 3], 3, 0, 2, [5], SamplingParams()),)), 4, CPU)
    for tensor in (batch.token_ids, batch.positions, batch.slots, batch.sampled_rows):
        assert tensor.dtype == torch.int64
    for tensor in (batch.query_starts, batch.context_lengths, batch.block_tables):
        assert tensor.dtype == torch.int32


def test_too_few_blocks_are_refused() -> None:
    """Padding the table instead would write into a page that belongs to another request."""
    plan = StepPlan((Chunk("short", list(range(9)), 9, 0, 9, [3, 4], SamplingParams()),))
    with pytest.raises(ValueError, match="short: 2 blocks for 9 positions"):
        build_batch(plan, 4, CPU)


@pytest.mark.parametrize("chunks", [((0, 3), (5, 1)), ((2, 4),)])
def test_tokens_of_prompts_that_are_not_the_last_rows_are_refused(chunks: tuple[tuple[int, int], ...]) -> None:
    """Before an answer's; in one chunk with it."""
    tokens = list(range(6))
    plan = StepPlan(tuple(Chunk("mixed", tokens, 5, *chunk, [0, 1], SamplingParams()) for chunk in chunks))
    with pytest.raises(ValueError, match="mixed"):
        build_batch(plan, 4, CPU)
