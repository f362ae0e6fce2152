"""A step plan as tensors: all chunks laid end to end, T rows for S sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pagestream.model.step import StepPlan


class _Shape(NamedTuple):
    rows: int  # T
    sequences: int  # S
    pages: int  # M
    sampled_rows: int  # R
    prefill_rows: int
    statistics: tuple[bool, ...]  # [R], or empty: of none


class _Numbers(NamedTuple):
    """What the tensors of a batch on a CPU are views of."""

    rows: npt.NDArray[np.int64]  # [3 T + R]: token_ids, positions, slots, sampled_rows
    lengths: npt.NDArray[np.int32]  # [2 S + 1]: query_starts, context_lengths
    tables: npt.NDArray[np.int32]  # [S, M]

    def fill(self, rows: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
        self.rows[:] = rows
        self.lengths[:] = lengths
        for row, pages in enumerate(tables):
            self.tables[row, : len(pages)] = pages


@dataclass(frozen=True, slots=True)
class Batch:
    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, within each sequence
    slots: torch.Tensor  # [T] int64, page * page_size + offset: where the row's key and value go
    query_starts: torch.Tensor  # [S + 1] int32: rows query_starts[s] : query_starts[s + 1] belong to sequence s
    context_lengths: torch.Tensor  # [S] int32, the rows of this step included
    block_tables: torch.Tensor  # [S, M] int32 pages in order; entries past the context are never read
    sampled_rows: torch.Tensor  # [R] int64, rising: the rows behind which tokens are chosen
    prefill_rows: int  # how many of the last rows are tokens of prompts
    with_statistics: torch.Tensor | None = None  # [R] bool: whose output distributions are wanted; None: of none
    shape: _Shape | None = None  # None: not to be filled again
    numbers: _Numbers | None = None


def build_batch(plan: StepPlan, page_size: int, device: torch.device, last: Batch | None = None) -> Batch:
    """The batch `last`, filled anew, if it has the right shape: with cold caches, as a network leaves them, that takes
    a third of the time. Else a new one.

    Raises ValueError for a chunk whose blocks do not hold its positions: they would go to another's page; and for
    tokens of a prompt that are not the last rows: they or others would be multiplied as what they are not.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_starts = [0]
    context_lengths: list[int] = []
    tables: list[Sequence[int]] = []
    sampled_rows: list[int] = []
    prefill_rows = 0
    for chunk in plan.chunks:
        end, blocks = chunk.end, chunk.block_ids
        pages = -(-end // page_size)
        if len(blocks) < pages:
            raise ValueError(f"{chunk.request_id}: {len(blocks)} blocks for {end} positions")
        if chunk.is_prefill:
            prefill_rows += chunk.length
        if (not chunk.is_prefill and prefill_rows) or (chunk.is_prefill and end > chunk.num_prompt_tokens):
            raise ValueError(
                f"{chunk.request_id}: rows {chunk.start} to {end} of a prompt of {chunk.num_prompt_tokens}"
            )
        token_ids += chunk.tokens_between(chunk.start, end)
        positions += range(chunk.start, end)
        for page in range(chunk.start // page_size, pages):
            first = page * page_size
            shift = (blocks[page] - page) * page_size
            slots += range(max(chunk.start, first) + shift, min(end, first + page_size) + shift)
        query_starts.append(len(positions))
        context_lengths.append(end)
        tables.append(blocks[:pages])
        sampled_rows += range(len(positions) - len(chunk.sampled_positions), len(positions))
    wants_statistics = any(chunk.output_stats for chunk in plan.chunks)
    statistics = tuple(chunk.output_stats for chunk in plan.chunks for _ in chunk.sampled_positions if wants_statistics)
    shape = _Shape(len(token_ids), len(tables), max(map(len, tables)), len(sampled_rows), prefill_rows, statistics)
    rows, lengths = token_ids + positions + slots + sampled_rows, query_starts + context_lengths
    if last is not None and last.numbers is not None and last.shape == shape:
        last.numbers.fill(rows, lengths, tables)
        return last
    numbers = _Numbers(
        np.empty(len(rows), np.int64), np.empty(len(lengths), np.int32), np.zeros((len(tables), shape.pages), np.int32)
    )
    numbers.fill(rows, lengths, tables)
    return _new_batch(numbers, shape, device)


def _new_batch(numbers: _Numbers, shape: _Shape, device: torch.device) -> Batch:
    def to_device(values: npt.NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(values)  # which, unlike torch's own operations, does not let go of the interpreter
        return tensor if device.type == "cpu" else tensor.to(device)

    count, can_be_filled = shape.rows, device.type == "cpu"
    return Batch(
        token_ids=to_device(numbers.rows[:count]),
        positions=to_device(numbers.rows[count : 2 * count]),
        slots=to_device(numbers.rows[2 * count : 3 * count]),
        query_starts=to_device(numbers.lengths[: shape.sequences + 1]),
        context_lengths=to_device(numbers.lengths[shape.sequences + 1 :]),
        block_tables=to_device(numbers.tables),
        sampled_rows=to_device(numbers.rows[3 * count :]),
        prefill_rows=shape.prefill_rows,
        with_statistics=to_device(np.array(shape.statistics)) if shape.statistics else None,
        shape=shape if can_be_filled else None,
        numbers=numbers if can_be_filled else None,
    )
