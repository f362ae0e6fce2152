"""The network's tensors: which ones a checkpoint must hold, and how they are laid out once loaded.

Names are Hugging Face's. Query, key and value projections are stored as one matrix, as are gate and up: fewer and
larger products for each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from pagestream.kernels.packing import packed_bytes
from pagestream.model.config import ModelConfig
from pagestream.model.errors import UnsupportedModelError
from pagestream.model.linear import DenseLinear, Linear, QuantizedLinear
from pagestream.model.packed import PackedMatrices
from pagestream.model.quantization import Bits


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Hq, Hkv: query and key/value heads; D: head size; E: hidden size; F: intermediate size."""

    attention_norm: torch.Tensor  # [E]
    query_key_value: Linear  # [(Hq + 2 Hkv) D, E]
    query_key_norm: torch.Tensor | None  # [Hq + Hkv, D], the head norms repeated for each head
    attention_output: Linear  # [E, Hq D]
    mlp_norm: torch.Tensor  # [E]
    gate_up: Linear  # [2 F, E]
    down: Linear  # [E, F]


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: Linear  # [V, E], looked up by token
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [E]
    lm_head: Linear  # [V, E]; the embedding itself when tied


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint, in the order in which they are read."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = (  # name, outputs, inputs, has a bias
        ("self_attn.q_proj", queries, hidden, config.qkv_bias),
        ("self_attn.k_proj", keys, hidden, config.qkv_bias),
        ("self_attn.v_proj", keys, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, queries, config.output_bias),
        ("mlp.gate_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.up_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, intermediate, config.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[layer + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[layer + "self_attn.k_norm.weight"] = (config.head_dim,)
        for name, outputs, inputs, has_bias in linears:
            shapes[f"{layer}{name}.weight"] = (outputs, inputs)
            if has_bias:
                shapes[f"{layer}{name}.bias"] = (outputs,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def count_parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def weight_bytes(config: ModelConfig, dtype: torch.dtype, bits: Mapping[str, Bits]) -> int:
    """Bytes of all tensors once loaded; `bits` as from `quantization.choose_bits`."""
    return sum(_tensor_bytes(shape, dtype, bits.get(name)) for name, shape in expected_tensors(config).items())


def _tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype, bits: Bits | None) -> int:
    return math.prod(shape) * dtype.itemsize if bits is None else packed_bytes(shape[0], shape[1], bits)


def build_weights(
    config: ModelConfig,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
    quantized: PackedMatrices | None = None,
) -> Weights:
    """Reads every expected tensor once, converts it and lets it go, so the peak is the model and one source tensor.
    What is in `quantized` is read from there and stays so.

    `progress` gets the bytes stored after each tensor; they add up to `weight_bytes`.
    Raises UnsupportedModelError for a tensor of another shape.
    """
    loader = _Loader(expected_tensors(config), read, quantized, dtype, device, progress)
    embedding = loader.linear("model.embed_tokens")
    layers = tuple(_build_layer(config, loader, f"model.layers.{index}.") for index in range(config.num_layers))
    norm = loader.stack("model.norm.weight")
    lm_head = embedding if config.tie_word_embeddings else loader.linear("lm_head")
    return Weights(embedding, layers, norm, lm_head)


@dataclass(frozen=True, slots=True)
class _Loader:
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    quantized: PackedMatrices | None
    dtype: torch.dtype
    device: torch.device
    progress: Callable[[int], None] | None

    def linear(self, *names: str) -> Linear:
        weights = [f"{name}.weight" for name in names]
        biases = [f"{name}.bias" for name in names]
        bias = self.stack(*biases) if biases[0] in self.shapes else None
        if self.quantized is None or weights[0] not in self.quantized.bits:
            return DenseLinear(self.stack(*weights), bias)
        parts = self.quantized.load(weights)
        for name in weights:
            self._report(name, self.quantized.bits[name])
        return QuantizedLinear(parts, bias, self.dtype)

    def stack(self, *names: str) -> torch.Tensor:
        """The named tensors one under the other."""
        rows = [self.shapes[name][0] for name in names]
        stacked = torch.empty((sum(rows), *self.shapes[names[0]][1:]), dtype=self.dtype, device=self.device)
        for name, end in zip(names, accumulate(rows), strict=True):
            part = stacked[end - self.shapes[name][0] : end]
            source = self.read(name)
            if source.shape != self.shapes[name]:
                raise UnsupportedModelError(
                    f"tensor {name} has shape {list(source.shape)}, the config says {list(self.shapes[name])}"
                )
            part.copy_(source)
            self._report(name, None)
        return stacked

    def _report(self, name: str, bits: Bits | None) -> None:
        if self.progress is not None:
            self.progress(_tensor_bytes(self.shapes[name], self.dtype, bits))


def _build_layer(config: ModelConfig, loader: _Loader, prefix: str) -> LayerWeights:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    query_key_norm = None
    if config.qk_norm:
        query_norm = loader.stack(attention + "q_norm.weight").expand(config.num_heads, -1)
        key_norm = loader.stack(attention + "k_norm.weight").expand(config.num_kv_heads, -1)
        query_key_norm = torch.cat((query_norm, key_norm))
    return LayerWeights(
        attention_norm=loader.stack(prefix + "input_layernorm.weight"),
        query_key_value=loader.linear(attention + "q_proj", attention + "k_proj", attention + "v_proj"),
        query_key_norm=query_key_norm,
        attention_output=loader.linear(attention + "o_proj"),
        mlp_norm=loader.stack(prefix + "post_attention_layernorm.weight"),
        gate_up=loader.linear(mlp + "gate_proj", mlp + "up_proj"),
        down=loader.linear(mlp + "down_proj"),
    )
