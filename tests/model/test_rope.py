from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pagestream.kernels import append_kv
from pagestream.model.config import ModelConfig, RopeScaling
from pagestream.model.rope import RotaryEmbedding, rope_frequencies

CPU = torch.device("cpu")
OURS = ModelConfig(
    architecture="llama",
    vocab_size=8,
    hidden_size=128,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position=131_072,
    rope_theta=500_000.0,
)
YARN = RopeScaling("yarn", factor=4.0, original_max_position=32_768)
SCALINGS = {
    "default": None,
    "linear": RopeScaling("linear", factor=3.0, original_max_position=4096),
    "llama3": RopeScaling("llama3", factor=8.0, original_max_position=8192),
    "llama3, other bands": replace(
        RopeScaling("llama3", factor=32.0, original_max_position=8192), low_freq_factor=2.0, high_freq_factor=7.0
    ),
    "yarn": YARN,
    "yarn, other turns": replace(YARN, beta_fast=64.0, beta_slow=3.0),
    "yarn, not truncated": replace(YARN, truncate=False),
    "yarn, attention factor": replace(YARN, attention_factor=0.7),
    "yarn, mscale": replace(YARN, factor=40.0, mscale=0.9, mscale_all_dim=0.5),
    "yarn, mscale alone counts for nothing": replace(YARN, mscale=0.5),
    "yarn, all pairs slow": replace(YARN, original_max_position=5),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def theirs(config: ModelConfig) -> LlamaRotaryEmbedding:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
        keys = {
            "linear": (),
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
        }[scaling.kind]
        rope |= {key: getattr(scaling, key) for key in keys if getattr(scaling, key) is not None}
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position,
            rope_parameters=rope,
        )
    )


def rotate(
    config: ModelConfig, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the network does it: heads [T, H, D] of queries and keys, turned for their positions."""
    heads = torch.cat((query, key, torch.zeros_like(key)), 1)
    caches = torch.zeros(2, 1, key.shape[1], 16, key.shape[2])
    append_kv(heads, *RotaryEmbedding(config, CPU)(positions), *caches, torch.arange(len(heads)))
    return heads[:, : query.shape[1]], caches[0, 0, :, : len(heads)].transpose(0, 1)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_frequencies_match_transformers(name: str, head_dim: int) -> None:
    """To one unit in the last place: at position 100,000 any more would already turn a pair visibly."""
    config = replace(OURS, head_dim=head_dim, rope_scaling=SCALINGS[name])
    frequencies, magnitude = rope_frequencies(config)
    oracle = theirs(config)
    torch.testing.assert_close(frequencies, oracle.inv_freq, rtol=2**-23, atol=0)
    assert magnitude == pytest.approx(oracle.attention_scaling, rel=1e-15)


@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn"])
def test_rotation_matches_transformers_at_far_positions(name: str) -> None:
    config = replace(OURS, rope_scaling=SCALINGS[name])
    positions = torch.tensor([0, 1, 2, 63, 4095, 32_768, 131_071])
    query, key = torch.randn(2, len(positions), config.num_heads, config.head_dim, generator=generator())
    cos, sin = theirs(config)(query, positions[None])
    expected_query, expected_key = apply_rotary_pos_emb(query[None], key[None], cos, sin, unsqueeze_dim=2)
    rotated_query, rotated_key = rotate(config, query, key, positions)
    torch.testing.assert_close(rotated_query, expected_query[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotated_key, expected_key[0], atol=1e-5, rtol=1e-5)


@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 4000))
@settings(deadline=None)
def test_products_depend_on_the_distance_alone(query_at: int, key_at: int, shift: int) -> None:
    query, key = torch.randn(2, 1, 1, OURS.head_dim, generator=generator())

    def score(*positions: int) -> float:
        queries, keys = rotate(OURS, query.repeat(2, 1, 1), key.repeat(2, 1, 1), torch.tensor(positions))
        return float((queries[0] * keys[1]).sum())

    tolerance = 8000 * 2**-24 * float((query * key).abs().sum())  # an angle of 8000 rad is known to half a unit
    assert math.isclose(score(query_at, key_at), score(query_at + shift, key_at + shift), abs_tol=4 * tolerance)
