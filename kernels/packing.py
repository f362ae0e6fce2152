"""The memory layout of 4- and 8-bit weights: 16 outputs side by side, so that each lane of a vector owns one output.

A weight [N, K] is cut into groups of 32 along its inputs, each a scale times integer codes:

    8 bits: scale * (code - 128)          codes 0 to 255
    4 bits: scale * code + min            codes 0 to 15

Packed: codes uint8 [N / 16, K / 32, 512], 8 quads of inputs x 16 outputs x 4 inputs; with 4 bits [N / 16, K / 32,
256], where a byte holds quad q in its low and quad q + 4 in its high half. Scales and mins are float16 [N / 16, K / 32,
16]. N is padded with zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 32
BLOCK = 16
SPAN = 256  # inputs that share a scale when a row is rounded
_STEPS = 2039  # 16 * 127 + 7: the largest integer that is 16 times a signed byte plus 4 signed bits, in both signs
_SMALLEST = 1e-30  # a span that stays below it counts as zeros
_QUADS = GROUP // 4


class Packed(NamedTuple):
    codes: Tensor
    scales: Tensor
    mins: Tensor | None


def pack(codes: Tensor, scales: Tensor, mins: Tensor | None) -> Packed:
    """Codes uint8 [N, K], scales and mins float16 [N, K / 32], without mins 8-bit, to the layout of `quantized_linear`.

    Raises ValueError where K is not a multiple of 32.
    """
    if codes.shape[1] % GROUP:
        raise ValueError(f"{codes.shape[1]} inputs are not a multiple of {GROUP}")
    padding = (0, 0, 0, -len(codes) % BLOCK)
    blocks = functional.pad(codes, padding).view(-1, BLOCK, codes.shape[1] // GROUP, _QUADS, 4).permute(0, 2, 3, 1, 4)
    packed_scales = _pack_scales(functional.pad(scales, padding))
    if mins is None:
        return Packed(blocks.flatten(2).contiguous(), packed_scales, None)
    low, high = blocks.chunk(2, dim=2)
    return Packed((low | (high << 4)).flatten(2), packed_scales, _pack_scales(functional.pad(mins, padding)))


def unpack_rows(codes: Tensor, scales: Tensor, mins: Tensor | None, rows: Tensor) -> Tensor:
    """The weights of the outputs `rows` int64 [T], in float32 [T, K]: an embedding lookup, among others."""
    block, lane = rows // BLOCK, rows % BLOCK
    bytes_ = codes.view(*codes.shape[:2], -1, BLOCK, 4)[block, :, :, lane]  # [T, G, 8 or 4, 4]
    scale = scales[block, :, lane, None].float()  # [T, G, 1]
    if mins is None:
        weights = scale * (bytes_.flatten(2).float() - 128)
    else:
        unpacked = torch.cat((bytes_ & 15, bytes_ >> 4), dim=2)
        weights = scale * unpacked.flatten(2) + mins[block, :, lane, None].float()
    return weights.flatten(1)


def round_input(rows: Tensor) -> Tensor:
    """Float32 rows [M, K] as `quantized_linear` sees them: per row and span of 256 a scale, max |x| / 2039, times
    integers.
    """
    return torch.cat([_round_span(span) for span in torch.split(rows, SPAN, dim=1)], 1)


def _round_span(span: Tensor) -> Tensor:
    largest = span.abs().amax(1, keepdim=True)
    steps = torch.full_like(largest, _STEPS) / largest  # _STEPS / largest would multiply by a rounded reciprocal
    integers = torch.round(span * torch.where(largest < _SMALLEST, 0, steps))
    return integers * torch.where(largest < _SMALLEST, 0, largest / _STEPS)


def packed_bytes(outputs: int, inputs: int, bits: int) -> int:
    """Bytes of a packed weight [outputs, inputs]."""
    per_group = GROUP * bits // 8 + (4 if bits == 4 else 2)
    return -(-outputs // BLOCK) * BLOCK * (inputs // GROUP) * per_group


def _pack_scales(scales: Tensor) -> Tensor:
    return scales.view(-1, BLOCK, scales.shape[1]).transpose(1, 2).contiguous()
