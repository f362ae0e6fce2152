"""Rotary position embedding, plain and stretched beyond the trained context.

Su et al., RoFormer (arXiv 2104.09864). The stretched frequencies are those Hugging Face checkpoints are trained
with: linear interpolation (arXiv 2306.15595), Llama 3.1's frequency bands, and YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import math

import torch

from pagestream.model.config import ModelConfig, RopeScaling


class RotaryEmbedding:
    """Cosines and sines are made for the positions of each step: exact at every position, and no table to size."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        frequencies, self._magnitude = rope_frequencies(config)
        self._frequencies = frequencies.to(device)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and signed sine [T, D] in fp32 for `append_kv`, at positions [T]."""
        angles = positions[:, None].float() * self._frequencies
        cos = angles.cos() * self._magnitude
        sin = angles.sin() * self._magnitude
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair, [D/2] fp32, and the factor on cosine and sine (1 except for YaRN)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, config, scaling), _yarn_magnitude(scaling)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Slow pairs are interpolated, fast ones kept, and those between blended by turns in the trained context."""
    turns = scaling.original_max_position / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: torch.Tensor, config: ModelConfig, scaling: RopeScaling) -> torch.Tensor:
    """NTK-by-parts: as llama3, but blended linearly in the index of the pair between two numbers of turns."""

    def pair_with(turns: float) -> float:
        wavelength = scaling.original_max_position / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    span = last - first if last != first else 0.001  # the published code's way round a division by zero
    kept = 1 - ((torch.arange(config.head_dim // 2, dtype=torch.float32) - first) / span).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn_magnitude(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)
