"""The metadata of a GGUF file to a ModelConfig. Keys and defaults are llama.cpp's."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Final

import torch

from pagestream.model.config import MAX_LAYERS, ModelConfig, RopeScaling
from pagestream.model.errors import UnsupportedModelError
from pagestream.model.rope import rope_frequencies
from pagestream.model.strict_keys import StrictKeys

ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")  # Mistral files call themselves llama

_END_TOKENS: Final = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def parse_gguf_config(
    metadata: Mapping[str, object], tensors: Set[str], vocab_size: int, divisors: torch.Tensor | None
) -> ModelConfig:
    """`tensors` are the names in the file, `vocab_size` the rows of its embedding, `divisors` [D/2] its tensor
    rope_freqs.weight, what each rotary frequency is divided by.

    Raises UnsupportedModelError for an architecture, a key under its prefix or a value that is not understood,
    ModelError for a missing or malformed one; both name it.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"general.architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    prefix = f"{architecture}."
    keys = StrictKeys(
        architecture, {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    )
    tokens = StrictKeys("vocabulary", metadata)
    keys.only("vocab_size", vocab_size)
    keys.only("attention.causal", True)  # noqa: FBT003, the value is the point
    keys.only("expert_count", 0)
    keys.only("expert_used_count", 0)
    keys.only("tensor_data_layout", "Meta AI original pth")  # how old converters call the usual order

    num_layers = keys.integer("block_count", maximum=MAX_LAYERS)
    hidden_size = keys.integer("embedding_length")
    num_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    keys.only("attention.value_length", head_dim)
    keys.only("rope.dimension_count", head_dim)
    max_position = keys.integer("context_length")
    rope_scaling = _rope_scaling(keys, max_position, divisors)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        max_position=max_position if rope_scaling is None else rope_scaling.reach(max_position),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        rope_scaling=rope_scaling,
        sliding_window=_sliding_window(keys, architecture, num_layers),
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        qk_norm=architecture == "qwen3",
        bos_token_id=next(iter(tokens.token_ids("tokenizer.ggml.bos_token_id")), None),
        eos_token_ids=tuple(dict.fromkeys(token for key in _END_TOKENS for token in tokens.token_ids(key))),
    )
    keys.finish()
    _check_divisors(config, divisors)
    return config


def _sliding_window(keys: StrictKeys, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """A file says how wide the window is, not for which layers: known for Mistral alone, where it is all."""
    if architecture != "llama":
        keys.only("attention.sliding_window", 0)
        return ()
    window = keys.optional_integer("attention.sliding_window", minimum=0)
    return (window,) * num_layers if window else ()


def _rope_scaling(keys: StrictKeys, max_position: int, divisors: torch.Tensor | None) -> RopeScaling | None:
    """Without a type, a factor means linear. Llama 3's scaling has no keys: see `_check_divisors`."""
    keys.ignore(("rope.scaling.finetuned",))
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        keys.only(f"rope.scaling.{key}", 1.0)
    kind = keys.get("rope.scaling.type") or "linear"
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    original = keys.integer("rope.scaling.original_context_length", max_position)
    beta_fast = keys.number("rope.scaling.yarn_beta_fast", 32.0)
    beta_slow = keys.number("rope.scaling.yarn_beta_slow", 1.0)
    if kind not in {"none", "linear", "yarn"}:
        raise UnsupportedModelError(f"rope.scaling.type {kind!r} is not supported, only none, linear and yarn")
    if divisors is not None:
        if kind == "yarn" or (kind == "linear" and factor != 1.0):
            raise UnsupportedModelError(f"rope_freqs.weight together with rope.scaling.type {kind!r} is not supported")
        return RopeScaling("llama3", float(divisors.max()), 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    if kind == "yarn":
        return RopeScaling("yarn", factor, original, beta_fast=beta_fast, beta_slow=beta_slow)
    return RopeScaling("linear", factor, max_position) if kind == "linear" and factor != 1.0 else None


def _check_divisors(config: ModelConfig, divisors: torch.Tensor | None) -> None:
    """rope_freqs.weight holds the outcome of Llama 3's scaling, not its settings. All published models share them
    (8192, 1, 4) but for the factor; whatever else made the tensor is refused rather than approximated.
    """
    if divisors is None:
        return
    plain, _ = rope_frequencies(replace(config, rope_scaling=None))
    scaled, _ = rope_frequencies(config)
    if divisors.shape != plain.shape or not torch.allclose(plain / divisors, scaled, rtol=1e-4, atol=0.0):
        raise UnsupportedModelError("rope_freqs.weight does not hold the frequencies of Llama 3's rotary scaling")
