"""GGUF metadata to ModelConfig. The oracle of rotary frequencies is transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pagestream.model.config import ModelConfig
from pagestream.model.errors import ModelError, UnsupportedModelError
from pagestream.model.gguf_config import parse_gguf_config
from pagestream.model.rope import rope_frequencies

REQUIRED = {
    "context_length": 512,
    "embedding_length": 128,
    "block_count": 2,
    "feed_forward_length": 256,
    "attention.head_count": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def parse(
    architecture: str = "llama",
    keys: dict[str, Any] | None = None,
    *,
    tensors: frozenset[str] = frozenset(),
    divisors: torch.Tensor | None = None,
    **vocabulary: Any,
) -> ModelConfig:
    metadata: dict[str, object] = {"general.architecture": architecture, "general.file_type": 3}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    metadata |= {f"{architecture}.{key}": value for key, value in (REQUIRED | (keys or {})).items()}
    return parse_gguf_config(metadata, tensors, 96, divisors)


def llama3_divisors(factor: float, original: int = 8192) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor that llama.cpp's converter stores, and the frequencies transformers uses for the same settings."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
    config = transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return 10000.0 ** -(torch.arange(0, 64, 2) / 64) / scaled, scaled


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_frequencies_are_recognised(factor: float) -> None:
    divisors, expected = llama3_divisors(factor)
    torch.testing.assert_close(rope_frequencies(parse(divisors=divisors))[0], expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("divisors", [llama3_divisors(8.0, original=2048)[0], torch.ones(16), torch.full((32,), 2.0)])
def test_other_frequencies_are_refused_rather_than_approximated(divisors: torch.Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        parse(divisors=divisors)


def test_frequencies_beside_scaling_keys_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight together"):
        parse(keys={"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, divisors=llama3_divisors(8.0)[0])


def test_linear_scaling_has_a_new_and_an_old_key() -> None:
    new = parse(keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}).rope_scaling
    old = parse(keys={"rope.scale_linear": 4.0}).rope_scaling
    assert new == old
    assert new is not None
    assert (new.kind, new.factor) == ("linear", 4.0)
    assert parse(keys={"rope.scaling.type": "none", "rope.scaling.factor": 4.0}).rope_scaling is None


def test_yarn_keys() -> None:
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 512, "yarn_beta_fast": 16.0, "finetuned": True}
    config = parse("qwen2", {f"rope.scaling.{key}": value for key, value in keys.items()})
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.original_max_position) == ("yarn", 512)
    assert (config.rope_scaling.beta_fast, config.rope_scaling.beta_slow, config.max_position) == (16.0, 1.0, 2048)


def test_a_window_is_every_layer_of_llama_and_of_no_other() -> None:
    assert parse(keys={"attention.sliding_window": 128}).sliding_window == (128, 128)
    assert parse(keys={"attention.sliding_window": 0}).sliding_window == ()
    with pytest.raises(UnsupportedModelError, match=r"attention\.sliding_window"):
        parse("qwen3", {"attention.sliding_window": 128})


def test_every_end_token_counts_once() -> None:
    config = parse(bos_token_id=1, eos_token_id=2, eot_token_id=5, eom_token_id=2)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 5))


def test_tensors_say_what_the_keys_do_not() -> None:
    config = parse(tensors=frozenset({"output.weight", "blk.0.attn_q.bias", "blk.0.ffn_down.bias"}))
    assert (config.tie_word_embeddings, config.qkv_bias, config.output_bias, config.mlp_bias) == (
        *(False, True),
        *(False, True),
    )
    assert parse().tie_word_embeddings
    assert (parse("qwen3").qk_norm, parse("qwen2").qk_norm) == (True, False)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"expert_count": 8}, "expert_count"),
        ({"rope.scaling.type": "longrope"}, "'longrope'"),
        ({"rope.scaling.attn_factor": 0.5}, r"rope\.scaling\.attn_factor"),
        ({"rope.dimension_count": 32}, r"rope\.dimension_count"),
        ({"attention.value_length": 32}, r"attention\.value_length"),
        ({"attention.causal": False}, r"attention\.causal"),
        ({"vocab_size": 97}, "vocab_size"),
    ],
)
def test_refuses_a_key_by_name(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        parse(keys=keys)


def test_refuses_an_architecture_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="'gemma3'"):
        parse("gemma3")


@pytest.mark.parametrize("key", REQUIRED)
def test_names_the_missing_or_malformed_key(key: str) -> None:
    with pytest.raises(ModelError, match=f"{key} is missing"):
        parse(keys={key: None})
    with pytest.raises(ModelError, match=f"{key} must be"):
        parse(keys={key: [1, 2]})
