"""Every model type against Hugging Face transformers on the same random weights, over pages that start as NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pagestream.model.batch import build_batch
from pagestream.model.config import ModelConfig, RopeScaling
from pagestream.model.errors import UnsupportedModelError
from pagestream.model.kv_cache import KVCache
from pagestream.model.linear import DenseLinear
from pagestream.model.network import Network
from pagestream.model.step import Chunk, SamplingParams, StepPlan
from pagestream.model.weights import Weights, build_weights, count_parameters, expected_tensors, weight_bytes

CPU = torch.device("cpu")
PAGE_SIZE = 16
NUM_PAGES = 24
NUM_LAYERS = 3
SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
OURS = ModelConfig(
    architecture="llama",
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_layers=NUM_LAYERS,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position=256,
    rope_theta=10_000.0,
)


def llama(**options: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options))


def llama_with_rope(**rope: object) -> PreTrainedModel:
    return llama(rope_parameters={"rope_theta": 10_000.0, **rope})


CASES: dict[str, tuple[Callable[[], PreTrainedModel], ModelConfig]] = {
    "llama": (llama, OURS),
    "llama, tied": (lambda: llama(tie_word_embeddings=True), replace(OURS, tie_word_embeddings=True)),
    "llama, biases": (
        lambda: llama(attention_bias=True, mlp_bias=True),
        replace(OURS, qkv_bias=True, output_bias=True, mlp_bias=True),
    ),
    "llama, one key head for each query head": (
        lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 4})),
        replace(OURS, num_kv_heads=4),
    ),
    "llama, linear rope": (
        lambda: llama_with_rope(rope_type="linear", factor=4.0),
        replace(OURS, rope_scaling=RopeScaling("linear", factor=4.0, original_max_position=64)),
    ),
    "llama, llama3 rope": (
        lambda: llama_with_rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        replace(OURS, rope_scaling=RopeScaling("llama3", factor=8.0, original_max_position=32)),
    ),
    "llama, yarn rope": (
        lambda: llama_with_rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=32),
        replace(OURS, rope_scaling=RopeScaling("yarn", factor=8.0, original_max_position=32)),
    ),
    "mistral, window shorter than the prompt": (
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)),
        replace(OURS, architecture="mistral", sliding_window=(7,) * NUM_LAYERS),
    ),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), replace(OURS, architecture="qwen2", qkv_bias=True)),
    "qwen2, window in the upper layers": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=19, max_window_layers=1)),
        replace(OURS, architecture="qwen2", qkv_bias=True, sliding_window=(None, 19, 19)),
    ),
    "qwen3": (
        lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
        replace(OURS, architecture="qwen3", qk_norm=True, tie_word_embeddings=True),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, ModelConfig]:
    make, config = CASES[request.param]
    return randomised(make()), config


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Norm weights and biases start as ones and zeros, which would hide a missing one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def load(model: PreTrainedModel, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Weights:
    return build_weights(config, model.state_dict().__getitem__, dtype, CPU)


def poisoned_cache(config: ModelConfig, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(config, NUM_PAGES, PAGE_SIZE, dtype, CPU)
    for layer in (*cache.layers, *cache.layer_scales):
        for part in layer:
            if part is not None and part.is_floating_point():
                part.fill_(torch.nan)
    return cache


def chunked_logits(
    network: Network,
    cache: KVCache,
    sequences: list[list[int]],
    next_length: Callable[[int], int],
    random: np.random.Generator,
) -> list[torch.Tensor]:
    """Logits at every position of each sequence; `next_length(left)` says how far each goes in a step, 0 for a rest."""
    free = random.permutation(NUM_PAGES).tolist()
    blocks = [[free.pop() for _ in range(-(-len(tokens) // PAGE_SIZE))] for tokens in sequences]
    done = [0] * len(sequences)
    pieces: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(start < len(tokens) for start, tokens in zip(done, sequences, strict=True)):
        lengths = [next_length(len(tokens) - start) for start, tokens in zip(done, sequences, strict=True)]
        running = [index for index, length in enumerate(lengths) if length]
        if not running:
            continue
        chunks = tuple(
            Chunk(str(i), sequences[i], len(sequences[i]), done[i], lengths[i], blocks[i], SamplingParams())
            for i in running
        )
        batch = build_batch(StepPlan(chunks), PAGE_SIZE, CPU)
        logits = network.outputs(replace(batch, sampled_rows=torch.arange(len(batch.token_ids))), cache).logits
        for index, rows in zip(running, logits.split([chunk.length for chunk in chunks]), strict=True):
            pieces[index].append(rows)
            done[index] += lengths[index]
    return [torch.cat(parts) for parts in pieces]


@pytest.mark.parametrize("chunking", ["whole prompts", "token by token", "random 1", "random 2", "random 3"])
def test_logits_of_every_position(case: tuple[PreTrainedModel, ModelConfig], chunking: str) -> None:
    model, config = case
    random = np.random.default_rng(len(chunking) + ord(chunking[-1]))
    sequences = [random.integers(config.vocab_size, size=size).tolist() for size in (1, 17, 45, 70)]

    def next_length(left: int) -> int:
        if chunking.startswith("random"):
            return int(random.integers(min(left, 20) + 1))
        return min(left, 1) if chunking == "token by token" else left

    ours = chunked_logits(Network(config, load(model, config)), poisoned_cache(config), sequences, next_length, random)
    for tokens, logits in zip(sequences, ours, strict=True):
        with torch.inference_mode():
            theirs = model(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=0)


def test_bfloat16_is_as_close_to_fp32_as_transformers_bfloat16() -> None:
    make, config = CASES["qwen3"]
    model = randomised(make())
    random = np.random.default_rng(0)
    tokens = random.integers(config.vocab_size, size=64).tolist()
    network = Network(config, load(model, config, torch.bfloat16))
    (ours,) = chunked_logits(network, poisoned_cache(config, torch.bfloat16), [tokens], lambda left: left, random)
    with torch.inference_mode():
        exact = model(torch.tensor([tokens])).logits[0]
        theirs = model.to(torch.bfloat16)(torch.tensor([tokens])).logits[0].float()
    assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()


def test_expected_tensors_are_those_of_transformers(case: tuple[PreTrainedModel, ModelConfig]) -> None:
    model, config = case
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    assert expected_tensors(config) == theirs
    assert count_parameters(config) == model.num_parameters()


def test_each_tensor_is_read_once_and_progress_adds_up() -> None:
    make, config = CASES["qwen3"]
    state, names, stored = make().state_dict(), [], []

    def read(name: str) -> torch.Tensor:
        names.append(name)
        return state[name]

    build_weights(config, read, torch.bfloat16, CPU, stored.append)
    assert sorted(names) == sorted(expected_tensors(config))
    assert sum(stored) == weight_bytes(config, torch.bfloat16, {})


def test_loaded_weights_do_not_share_memory_with_the_source() -> None:
    """A memory-mapped file must not stay mapped, nor change the model when it changes."""
    state = llama().state_dict()
    embedding = build_weights(OURS, state.__getitem__, torch.float32, CPU).embedding
    assert isinstance(embedding, DenseLinear)
    assert embedding.weight.data_ptr() != state["model.embed_tokens.weight"].data_ptr()


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    """A shape that would broadcast is the dangerous one."""
    state = llama().state_dict()
    state["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(1, 48)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn\.k_proj\.weight .*\[1, 48\].*\[128, 48\]"):
        build_weights(OURS, state.__getitem__, torch.float32, CPU)
