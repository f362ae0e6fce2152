"""A step plan as tensors: all chunks laid end to end, T rows for S sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
    sampled_rows: torch.Tensor  # [R] int64: the last row of each chunk that samples, in chunk order


def build_batch(plan: StepPlan, page_size: int, device: torch.device) -> Batch:
    """Raises ValueError for a chunk whose blocks do not hold its positions: they would go to another's page."""
    chunks = plan.chunks
    lengths = np.array([chunk.length for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks])
    query_starts = np.concatenate(([0], np.cumsum(lengths)))
    sequences = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(query_starts[-1]) + (starts - query_starts[:-1])[sequences]

    num_pages = [-(-chunk.end // page_size) for chunk in chunks]
    block_tables = np.zeros((len(chunks), max(num_pages)), dtype=np.int32)
    for row, (chunk, pages) in enumerate(zip(chunks, num_pages, strict=True)):
        if len(chunk.block_ids) < pages:
            raise ValueError(f"{chunk.request_id}: {len(chunk.block_ids)} blocks for {chunk.end} positions")
        block_tables[row, :pages] = chunk.block_ids[:pages]
    pages_of_rows = block_tables[sequences, positions // page_size].astype(np.int64)

    def to_device(array: np.ndarray, dtype: type[np.signedinteger]) -> torch.Tensor:
        return torch.from_numpy(array.astype(dtype, copy=False)).to(device)

    return Batch(
        token_ids=to_device(np.concatenate([chunk.tokens[chunk.start : chunk.end] for chunk in chunks]), np.int64),
        positions=to_device(positions, np.int64),
        slots=to_device(pages_of_rows * page_size + positions % page_size, np.int64),
        query_starts=to_device(query_starts, np.int32),
        context_lengths=to_device(starts + lengths, np.int32),
        block_tables=to_device(block_tables, np.int32),
        sampled_rows=to_device(query_starts[1:][[chunk.samples for chunk in chunks]] - 1, np.int64),
    )
