"""config.json to ModelConfig. The oracle is transformers reading the same keys."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pagestream.model.config import ModelConfig
from pagestream.model.errors import ModelError, UnsupportedModelError
from pagestream.model.hf_config import parse_hf_config
from pagestream.model.rope import rope_frequencies

SIZES = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# As transformers 4 wrote them: rope_theta and rope_scaling at the top level, torch_dtype, layer_types or not.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama 1": {"model_type": "llama", "hidden_act": "silu", "pretraining_tp": 1, "torch_dtype": "float16"},
    "llama 3.1": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 512,
            "rope_type": "llama3",
        },
        "eos_token_id": [300, 301],
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm2": {
        "model_type": "llama",
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral 0.1": {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 10000.0},
    "mistral 0.2": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1000000.0},
    "mistral, no window key": {"model_type": "mistral"},
    "qwen 2.5, yarn": {
        "model_type": "qwen2",
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        "sliding_window": 131072,
        "use_sliding_window": False,
        "max_window_layers": 3,
    },
    "qwen 2, window": {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
    "qwen 3": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
    "qwen 3, listed layers": {
        "model_type": "qwen3",
        "head_dim": 32,
        "use_sliding_window": True,
        "sliding_window": 32,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
}


def assert_same(ours: ModelConfig, theirs: transformers.PreTrainedConfig) -> None:
    assert ours.architecture == theirs.model_type
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name)
    with torch.device("meta"):
        names = set(transformers.AutoModelForCausalLM.from_config(theirs).state_dict())
    assert ours.qkv_bias == ("model.layers.0.self_attn.q_proj.bias" in names)
    assert ours.output_bias == ("model.layers.0.self_attn.o_proj.bias" in names)
    assert ours.mlp_bias == ("model.layers.0.mlp.up_proj.bias" in names)
    assert ours.qk_norm == ("model.layers.0.self_attn.q_norm.weight" in names)
    windows = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * ours.num_layers
    expected = [windows if kind == "sliding_attention" else None for kind in kinds]
    assert list(ours.sliding_window or [None] * ours.num_layers) == expected


def assert_same_rope(ours: ModelConfig, theirs: transformers.PreTrainedConfig) -> None:
    frequencies, magnitude = rope_frequencies(ours)
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, ours.head_dim, 2, dtype=torch.float64) / ours.head_dim
        expected, scale = theirs.rope_parameters["rope_theta"] ** -exponents, 1.0
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    torch.testing.assert_close(frequencies, expected.float(), rtol=1e-6, atol=0.0)
    assert magnitude == pytest.approx(scale)


@pytest.mark.parametrize("values", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_reads_configs_of_transformers_4_as_transformers_does(values: dict[str, Any]) -> None:
    values = SIZES | values
    theirs = transformers.AutoConfig.for_model(**values)
    ours = parse_hf_config(values)
    assert_same(ours, theirs)
    assert_same_rope(ours, theirs)


@pytest.mark.parametrize("values", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_what_transformers_5_writes_means_the_same(values: dict[str, Any]) -> None:
    """Every key it writes is known; rope_parameters replaces rope_theta and rope_scaling."""
    values = SIZES | values
    rewritten = transformers.AutoConfig.for_model(**values).to_dict()
    assert "rope_parameters" in rewritten
    old, new = parse_hf_config(values), parse_hf_config(rewritten)
    assert new.eos_token_ids == old.eos_token_ids or "eos_token_id" not in values
    for name in ("rope_theta", "rope_scaling", "sliding_window", "head_dim", "num_kv_heads", "tie_word_embeddings"):
        assert getattr(new, name) == getattr(old, name)


def test_old_llama_without_key_value_heads_has_one_per_query_head() -> None:
    values = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    assert parse_hf_config(values | {"model_type": "llama"}).num_kv_heads == 6


def test_generation_config_decides_the_end_tokens() -> None:
    values = SIZES | {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 7}
    assert parse_hf_config(values).eos_token_ids == (7,)
    assert parse_hf_config(values, {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert parse_hf_config(values, {"do_sample": True}).eos_token_ids == (7,)
    assert parse_hf_config(values).bos_token_id == 1


def test_yarn_reaches_its_factor_times_the_original_context() -> None:
    assert parse_hf_config(SIZES | PUBLISHED["qwen 2.5, yarn"]).max_position == 4 * 4096
    assert parse_hf_config(SIZES | PUBLISHED["linear"]).max_position == 4096


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma3"}, "gemma3"),
        ({"model_type": None}, "model_type"),
        ({"attention_sink_size": 4}, "attention_sink_size"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "rope_scaling.*mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.*full_attention"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
    ],
)
def test_refuses_by_name_what_it_does_not_understand(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        parse_hf_config(SIZES | {"model_type": "llama"} | change)


@pytest.mark.parametrize(
    ("model_type", "key"),
    [pair for pair in itertools.product(MODEL_TYPES, SIZES) if pair != ("llama", "num_key_value_heads")],
)
def test_names_the_missing_key(model_type: str, key: str) -> None:
    values = {name: value for name, value in SIZES.items() if name != key}
    with pytest.raises(ModelError, match=f"{key} is missing"):
        parse_hf_config(values | {"model_type": model_type})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"num_key_value_heads": 4}, "6 query heads cannot share 4"),
        ({"head_dim": 100}, "head size 100 is not supported, only multiples of 8"),
    ],
)
def test_names_the_malformed_value(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parse_hf_config(SIZES | {"model_type": "llama"} | change)
