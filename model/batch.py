"""A step plan as tensors: all chunks laid end to end, T rows for S sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pagestream.model.step import StepPlan


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


def build_batch(plan: StepPlan, page_size: int, device: torch.device) -> Batch:
    """Raises ValueError for a chunk whose blocks do not hold its positions: they would go to another's page; and for
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
    block_tables = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, pages_in_order in enumerate(tables):
        block_tables[row, : len(pages_in_order)] = pages_in_order

    def to_device(values: npt.ArrayLike, dtype: type[np.signedinteger]) -> torch.Tensor:
        tensor = torch.from_numpy(np.asarray(values, dtype))
        return tensor if device.type == "cpu" else tensor.to(device)

    return Batch(
        token_ids=to_device(token_ids, np.int64),
        positions=to_device(positions, np.int64),
        slots=to_device(slots, np.int64),
        query_starts=to_device(query_starts, np.int32),
        context_lengths=to_device(context_lengths, np.int32),
        block_tables=to_device(block_tables, np.int32),
        sampled_rows=to_device(sampled_rows, np.int64),
        prefill_rows=prefill_rows,
    )
