"""Matrices of the network: multiplied with hidden rows, or looked up by row. Dense, or 4- and 8-bit in groups of 32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from pagestream import kernels
from pagestream.kernels.decoder import Matrix, Part
from pagestream.kernels.packing import pack, unpack_rows
from pagestream.model.quantization import Groups


class Linear(Protocol):
    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out]."""

    def lookup(self, outputs: torch.Tensor) -> torch.Tensor:
        """The weights of the outputs int64 [T], as rows [T, in]."""


@dataclass(frozen=True, slots=True)
class DenseLinear:
    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor | None  # [out]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """A lone row is a matrix-vector product: in bf16 on a CPU torch reads the weights 1.4 times faster that way
        than through its matrix product."""
        if len(rows) != 1:
            return functional.linear(rows, self.weight, self.bias)
        if self.bias is None:
            return torch.mv(self.weight, rows[0])[None]
        return torch.addmv(self.bias, self.weight, rows[0])[None]

    def lookup(self, outputs: torch.Tensor) -> torch.Tensor:
        return functional.embedding(outputs, self.weight)


def pack_matrices(matrices: Sequence[Groups]) -> list[Part]:
    """Those of equal bits that follow each other are one under the other: one product."""
    return [
        Part(pack(groups.codes, groups.scales, groups.mins), outputs=len(groups.codes))
        for groups in _join_equal(matrices)
    ]


class QuantizedLinear:
    """Matrices in groups, one under the other."""

    def __init__(self, parts: Sequence[Part], bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.matrix = Matrix(tuple(parts), bias)
        self._outputs = sum(part.outputs for part in parts)
        self._dtype = dtype

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        out = rows.new_empty(len(rows), self._outputs)
        begin = 0
        for part in self.matrix.parts:
            kernels.quantized_linear(rows, *part.packed, out=out[:, begin : begin + part.outputs])
            begin += part.outputs
        return out if self.matrix.bias is None else out.add_(self.matrix.bias)

    def lookup(self, outputs: torch.Tensor) -> torch.Tensor:
        (part,) = self.matrix.parts
        return unpack_rows(*part.packed, outputs).to(self._dtype)


def _join_equal(matrices: Sequence[Groups]) -> list[Groups]:
    joined = [matrices[0]]
    for groups in matrices[1:]:
        if groups.bits == joined[-1].bits:
            joined[-1] = joined[-1].above(groups)
        else:
            joined.append(groups)
    return joined
