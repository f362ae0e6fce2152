"""The CUDA kernels' source, compiled by g++ under AddressSanitizer and UBSan and executed on this CPU."""

from __future__ import annotations

import fcntl
import platform
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "kernels" / "csrc"
FLAGS = ("-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PLAN, ATTENTION, APPEND = 0, 1, 2
DTYPES = {torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 4}  # csrc/params.h
WORKSPACE_HEADER, PART_ROWS, PART_STATE = 4, 64, 8  # csrc/cuda/params.h


@dataclass(frozen=True, slots=True)
class Sources:
    host: Path = HERE
    csrc: Path = CSRC


class HostGpu:
    """The program of main.cpp: one process, one request after the other."""

    def __init__(self, program: Path, sources: Sources) -> None:
        self.sources = sources
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(60) == 0

    def segments(
        self,
        query_starts: list[int],
        lengths: list[int],
        *,
        heads: tuple[int, int],
        window: int = 0,
        num_blocks: int = 12,
        seed: int = 0,
    ) -> list[tuple[int, ...]]:
        """The plan: (block, sequence, KV head, row block, tile, tiles, tiles of the row block) in order."""
        sizes = (PLAN, seed, num_blocks, 0, 0, len(lengths), *heads, 64, 64, 1, window, 0, 0, 0, 0)
        integers = [torch.tensor(x, dtype=torch.int32) for x in (query_starts, lengths)]
        self._send(sizes, 1.0, [*integers, _workspace(num_blocks, 64), *[None] * 9])
        (count,) = struct.unpack("q", self._receive(8))
        if count == 0:
            return []
        flat = torch.frombuffer(bytearray(self._receive(8 * count)), dtype=torch.int64)
        return [tuple(row) for row in flat.view(-1, 7).tolist()]

    def attend(
        self,
        batch: Any,
        *,
        stats: bool,
        page_masses: bool,
        num_blocks: int = 6,
        seed: int = 0,
        scales: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`out`, statistics and page masses of a Batch, by `num_blocks` blocks in an order drawn from `seed`; `scales`:
        of e4m3 keys and values."""
        query, cache = batch.query, batch.key_cache
        tokens, heads, head_size = query.shape
        max_pages, page_size = batch.block_tables.shape[1], cache.shape[2]
        sizes = (
            ATTENTION,
            seed,
            num_blocks,
            DTYPES[query.dtype],
            DTYPES[cache.dtype],
            len(batch.context_lengths),
            heads,
            cache.shape[1],
        )
        sizes += (head_size, page_size, max_pages, batch.window, *query.stride()[:2], *cache.stride()[:2])
        outputs = [
            torch.full((tokens, heads, head_size), float("nan"), dtype=query.dtype),
            torch.full((tokens, heads, 5), float("nan")) if stats else None,
            torch.full((tokens, heads, max_pages), float("nan")) if page_masses else None,
        ]
        slices = tokens * heads * max_pages * (page_size // 16) if page_masses and page_size > 16 else 0
        integers = (batch.query_starts, batch.context_lengths, _workspace(num_blocks, head_size, slices))
        inputs = (_storage(query), _storage(cache), _storage(batch.value_cache), *scales, batch.block_tables)
        self._send(sizes, batch.scale, [*integers, *inputs, *outputs])
        for output in outputs:
            if output is not None and output.numel():
                raw = bytearray(self._receive(output.nbytes))
                output.view(torch.uint8).view(-1).copy_(torch.frombuffer(raw, dtype=torch.uint8))
        return outputs[0], outputs[1], outputs[2]  # type: ignore[return-value]

    def append(
        self,
        heads: Tensor,
        cos: Tensor,
        signed_sin: Tensor,
        caches: tuple[Tensor, Tensor],
        slots: Tensor,
        *,
        norm_weight: Tensor | None = None,
        epsilon: float = 0.0,
        scales: tuple[Tensor | None, Tensor | None] = (None, None),
        seed: int = 0,
    ) -> None:
        """The append kernel, in place as the operator does it; heads and caches are contiguous."""
        pages, kv_heads, page_size, head_size = caches[0].shape
        sizes = (APPEND, seed, 0, DTYPES[heads.dtype], DTYPES[caches[0].dtype], len(heads))
        sizes += (
            heads.shape[1] - 2 * kv_heads,
            kv_heads,
            head_size,
            page_size,
            pages,
            0,
            *heads.stride()[:2],
            *caches[0].stride()[:2],
        )
        self._send(sizes, epsilon, [heads, cos, signed_sin, norm_weight, *caches, slots, *scales])
        for tensor in (heads, *caches):
            raw = bytearray(self._receive(tensor.nbytes))
            tensor.view(torch.uint8).view(-1).copy_(torch.frombuffer(raw, dtype=torch.uint8))

    def _send(self, sizes: tuple[int, ...], scale: float, arrays: list[Tensor | None]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack("16qd", *sizes, scale))
        for array in arrays:
            raw = b"" if array is None else array.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            self._process.stdin.write(struct.pack("q", len(raw)) + raw)
        self._process.stdin.flush()

    def _receive(self, count: int) -> bytes:
        assert self._process.stdout is not None
        raw = self._process.stdout.read(count)
        assert len(raw) == count, f"the kernel stopped: exit code {self._process.wait(60)}, report on stderr"
        return raw


def _workspace(num_blocks: int, head_size: int, slices: int = 0) -> Tensor:
    """Full of NaN: the plan kernel must write all that is read."""
    parts = 2 * PART_ROWS * (PART_STATE + head_size)
    return torch.full((WORKSPACE_HEADER + num_blocks * (8 + parts) + slices,), float("nan"))


def _storage(tensor: Tensor) -> Tensor:
    """From the first to the last element, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.as_strided(tensor, (last + 1,), (1,))


def compiled(folder: Path) -> Path:
    """The program, in a folder that test processes share: the first compiles, the others wait for it. Skips the test
    where it cannot be compiled."""
    compiler = shutil.which("g++")
    if platform.machine() != "x86_64" or compiler is None:
        pytest.skip("the host machine for CUDA kernels is x86-64 and needs g++")
    program = folder / "host_gpu"
    includes = (f"-I{HERE}", f"-I{CSRC}")
    sources = (HERE / "machine.cpp", HERE / "main.cpp")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            subprocess.run([compiler, *FLAGS, *SANITIZERS, *includes, *sources, "-o", program], check=True)
    return program


@contextmanager
def running(folder: Path) -> Iterator[HostGpu]:
    machine = HostGpu(compiled(folder), Sources())
    yield machine
    machine.close()
