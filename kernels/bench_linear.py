"""Quantised linear layers against torch's own operators: `python -m pagestream.kernels.bench_linear`.

A weight of 3072 x 576 (gate and up of SmolLM2-135M), in turn one of 32 copies, so that it comes from beyond L2. Ours in
4 and 8 bits, bf16 matrix products, and torch's packed 4- and 8-bit operators alternate; medians of the repetitions, in
microseconds, all torch threads. torch's packed operators are left out where they take minutes (over 64 rows).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pagestream.kernels import build, packing, quantized_linear

_OUTPUTS, _INPUTS = 3072, 576
_COPIES = 32
_REPETITIONS = 9
_FEW_ROWS = 64
_Call = Callable[[int], object]


def _packed(bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    codes = torch.randint(0, 2**bits, (_OUTPUTS, _INPUTS), dtype=torch.uint8)
    scales = torch.rand(_OUTPUTS, _INPUTS // packing.GROUP).half()
    return packing.pack(codes, scales, -scales if bits == 4 else None)


def _torch_int4() -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 16, (_OUTPUTS, _INPUTS), dtype=torch.int32)
    scales = torch.rand(_INPUTS // packing.GROUP, _OUTPUTS, 2).bfloat16()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scales  # noqa: SLF001  # torch names its packed operators so


def _torch_int8() -> tuple[Tensor, Tensor]:
    return torch.randint(-127, 128, (_OUTPUTS, _INPUTS), dtype=torch.int8), torch.rand(_OUTPUTS).bfloat16()


class Weights:
    def __init__(self) -> None:
        self._ours = {bits: [_packed(bits) for _ in range(_COPIES)] for bits in (4, 8)}
        self._bf16 = [torch.randn(_OUTPUTS, _INPUTS).bfloat16() for _ in range(_COPIES)]
        self._int4 = [_torch_int4() for _ in range(_COPIES)]
        self._int8 = [_torch_int8() for _ in range(_COPIES)]

    def calls(self, rows: int) -> dict[str, _Call]:
        """What multiplies `rows` rows with copy i, by name."""
        x = torch.randn(rows, _INPUTS)
        narrow, out = x.bfloat16(), torch.empty(rows, _OUTPUTS)
        calls: dict[str, _Call] = {
            "ours, 4 bits": lambda i: quantized_linear(x, *self._ours[4][i], out=out),
            "ours, 8 bits": lambda i: quantized_linear(x, *self._ours[8][i], out=out),
            "bf16": lambda i: torch.nn.functional.linear(narrow, self._bf16[i]),
        }
        if rows <= _FEW_ROWS:
            int4, int8 = torch.ops.aten._weight_int4pack_mm_for_cpu, torch.ops.aten._weight_int8pack_mm  # noqa: SLF001
            calls["torch int4pack"] = lambda i: int4(narrow, self._int4[i][0], packing.GROUP, self._int4[i][1])
            calls["torch int8pack"] = lambda i: int8(narrow, *self._int8[i])
        return calls


def _microseconds(call: _Call, times: int) -> float:
    started = time.perf_counter()
    for i in range(times):
        call(i)
    return (time.perf_counter() - started) / times * 1e6


def main() -> None:
    torch.manual_seed(0)
    weights = Weights()
    sys.stdout.write(f"{build.load().isa}, {torch.get_num_threads()} threads\n")
    for rows in (1, 4, 8, 16, 32, 64, 512, 2048):
        calls = weights.calls(rows)
        times = _COPIES if rows <= _FEW_ROWS else 4
        samples = [[_microseconds(call, times) for call in calls.values()] for _ in range(_REPETITIONS)]
        medians = (statistics.median(column) for column in zip(*samples, strict=True))
        columns = "".join(f"  {name} {median:.0f}" for name, median in zip(calls, medians, strict=True))
        sys.stdout.write(f"{rows:5} rows{columns}\n")


if __name__ == "__main__":
    main()
