"""Weights that stay 4- or 8-bit in memory: which tensors, by how many bits, and how others become so."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from pagestream.kernels.packing import GROUP

Bits = Literal[4, 8]
_ROWS_AT_ONCE = 16384


@dataclass(frozen=True, slots=True)
class Groups:
    """A matrix in groups of 32 inputs: 8 bits scale * (code - 128), or with mins 4 bits scale * code + min."""

    codes: torch.Tensor  # uint8 [N, K]
    scales: torch.Tensor  # float16 [N, K / 32]
    mins: torch.Tensor | None  # likewise

    @property
    def bits(self) -> Bits:
        return 8 if self.mins is None else 4

    def select(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> Groups:
        """Its rows put in another order."""
        return Groups(rows(self.codes), rows(self.scales), None if self.mins is None else rows(self.mins))

    def above(self, other: Groups) -> Groups:
        """The rows of `other`, of equal bits, under its own."""
        mins = None if self.mins is None or other.mins is None else torch.cat((self.mins, other.mins))
        return Groups(torch.cat((self.codes, other.codes)), torch.cat((self.scales, other.scales)), mins)


def choose_bits(shapes: Mapping[str, tuple[int, ...]], bits: Bits, own: Mapping[str, Bits]) -> dict[str, Bits]:
    """Bits of each tensor that is kept quantised, by name.

    Groups that the file already has (`own`) stay as they are, bit for bit. Other matrices of the layers get `bits`,
    embedding and head 8. Norms, biases and matrices whose inputs do not divide into groups are not quantised.
    """
    chosen: dict[str, Bits] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] % GROUP == 0:
            chosen[name] = own.get(name, bits if name.startswith("model.layers.") else 8)
    return chosen


def quantize(matrix: torch.Tensor, bits: Bits) -> Groups:
    """To the nearest codes. 8 bits: symmetric, the largest magnitude of a group is code 127 from the middle. 4 bits:
    from the least to the largest value of a group in 15 steps. A few rows at a time, to need little more memory.
    """
    return functools.reduce(Groups.above, (_quantize_rows(rows, bits) for rows in torch.split(matrix, _ROWS_AT_ONCE)))


def _quantize_rows(matrix: torch.Tensor, bits: Bits) -> Groups:
    groups = torch.unflatten(matrix.float(), 1, (-1, GROUP))  # [N, K / 32, 32]
    if bits == 8:
        scales = (groups.abs().amax(-1) / 127).half()
        codes = torch.round(groups / _divisor(scales)).clamp(-127, 127) + 128
        return Groups(codes.to(torch.uint8).flatten(1), scales, None)
    low, high = groups.aminmax(dim=-1)
    mins, scales = low.half(), ((high - low) / 15).half()
    codes = torch.round((groups - mins[..., None].float()) / _divisor(scales)).clamp(0, 15)
    return Groups(codes.to(torch.uint8).flatten(1), scales, mins)


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, 1, scales.float())[..., None]
