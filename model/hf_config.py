"""A Hugging Face config.json, as transformers 4 and 5 write it, to a ModelConfig. Defaults are transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pagestream.model.config import MAX_LAYERS, ModelConfig, RopeScaling
from pagestream.model.errors import ModelError, UnsupportedModelError
from pagestream.model.strict_keys import StrictKeys

MODEL_TYPES: Final = ("llama", "mistral", "qwen2", "qwen3")

# Keys that say nothing about what the network computes: provenance, training, the Python side of transformers, and
# what `generate` used to keep in the model's config. pretraining_tp > 1 splits the same products.
# fmt: off
_IRRELEVANT: Final = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_name_or_path", "architectures",
    "attention_dropout", "attn_implementation", "chunk_size_feed_forward", "dtype", "id2label", "initializer_range",
    "is_llama_config", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "return_dict_in_generate", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
    "do_sample", "early_stopping", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beams",
    "num_return_sequences", "repetition_penalty", "temperature", "top_k", "top_p", "typical_p",
})
# fmt: on


def parse_hf_config(values: Mapping[str, object], generation: Mapping[str, object] | None = None) -> ModelConfig:
    """`generation` is generation_config.json, whose end-of-sequence ids win over those of config.json.

    Raises UnsupportedModelError for a model type, key or value that is not understood, ModelError for a missing or
    malformed one; both name it.
    """
    keys = StrictKeys("config.json", values)
    model_type = keys.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"config.json: model_type {model_type!r} is not supported, only {', '.join(MODEL_TYPES)}"
        )
    keys.only("hidden_act", "silu")
    keys.only("quantization_config", None)
    keys.only("is_encoder_decoder", False)  # noqa: FBT003, the value is the point
    keys.only("rope_interleaved", False)  # noqa: FBT003, the value is the point
    keys.ignore(_IRRELEVANT)

    num_layers = keys.integer("num_hidden_layers", maximum=MAX_LAYERS)
    hidden_size = keys.integer("hidden_size")
    num_heads = keys.integer("num_attention_heads")
    max_position = keys.integer("max_position_embeddings")
    rope_theta, rope_scaling = _rope(keys, max_position)
    attention_bias = keys.boolean("attention_bias", default=False) if model_type in {"llama", "qwen3"} else False
    eos_token_ids = keys.token_ids("eos_token_id")
    config = ModelConfig(
        architecture=model_type,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("num_key_value_heads", num_heads if model_type == "llama" else None),
        head_dim=keys.integer("head_dim", 128 if model_type == "qwen3" else hidden_size // num_heads),
        rms_norm_eps=keys.number("rms_norm_eps"),
        max_position=max_position if rope_scaling is None else rope_scaling.reach(max_position),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=_sliding_window(keys, model_type, num_layers),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", default=False),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias,
        mlp_bias=keys.boolean("mlp_bias", default=False) if model_type == "llama" else False,
        qk_norm=model_type == "qwen3",
        bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
        eos_token_ids=StrictKeys("generation_config.json", generation or {}).token_ids("eos_token_id") or eos_token_ids,
    )
    keys.finish()
    return config


def _sliding_window(keys: StrictKeys, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral: every layer, 4096 where the key is missing. Qwen: the listed layers, or those from max_window_layers."""
    if model_type == "llama":
        keys.only("sliding_window", None)
        return ()
    window = keys.optional_integer("sliding_window") if "sliding_window" in keys else 4096
    if model_type == "mistral":
        return (window,) * num_layers if window else ()
    first = keys.integer("max_window_layers", 28, minimum=0)
    layer_types = keys.get("layer_types")
    if not keys.boolean("use_sliding_window", default=False) or window is None:
        keys.only("layer_types", layer_types if layer_types is None else ["full_attention"] * num_layers)
        return ()
    if layer_types is None:
        layer_types = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    windows = {"full_attention": None, "sliding_attention": window}
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or not windows.keys() >= set(layer_types):
        raise UnsupportedModelError(
            f"config.json: layer_types must say full_attention or sliding_attention for each of {num_layers} layers"
        )
    sliding = tuple(windows[kind] for kind in layer_types)
    return sliding if any(sliding) else ()


def _rope(keys: StrictKeys, max_position: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling. Transformers 4 keeps them in rope_theta and rope_scaling, 5 together in rope_parameters."""
    keys.only("partial_rotary_factor", 1.0)
    theta = keys.number("rope_theta", 10000.0)
    old, new = keys.get("rope_scaling"), keys.get("rope_parameters")
    name, values = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    if not isinstance(values, dict):
        raise ModelError(f"config.json: {name} must be an object, not {values!r}")
    rope = StrictKeys(f"config.json: {name}", values)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope.only("type", values.get("rope_type", kind))
    rope.only("partial_rotary_factor", 1.0)
    theta = rope.number("rope_theta", theta)
    scaling = None if kind == "default" else _scaling(rope, kind, max_position)
    rope.finish()
    return theta, scaling


def _scaling(rope: StrictKeys, kind: object, max_position: int) -> RopeScaling:
    factor = rope.number("factor")
    if kind == "linear":
        return RopeScaling("linear", factor, max_position)
    original = rope.integer("original_max_position_embeddings", max_position)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor,
            original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor,
            original,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            attention_factor=rope.optional_number("attention_factor"),
            mscale=rope.optional_number("mscale"),
            mscale_all_dim=rope.optional_number("mscale_all_dim"),
            truncate=rope.boolean("truncate", default=True),
        )
    raise UnsupportedModelError(
        f"config.json: rope type {kind!r} is not supported, only default, linear, llama3 and yarn"
    )
