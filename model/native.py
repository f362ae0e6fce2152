"""The network as one call into the kernels, where they take it: all matrices quantised, on a CPU, with a compiler."""

from __future__ import annotations

from pagestream.kernels.decoder import Decoder, Layer, Matrix, has_decoder
from pagestream.model.config import ModelConfig
from pagestream.model.linear import Linear, QuantizedLinear
from pagestream.model.rope import rope_frequencies
from pagestream.model.weights import LayerWeights, Weights


def native_decoder(config: ModelConfig, weights: Weights) -> Decoder | None:
    """None where network.py has to do the work."""
    if not has_decoder():
        return None
    try:
        embedding, lm_head = _matrix(weights.embedding), _matrix(weights.lm_head)
        layers = [_layer(window, layer) for window, layer in zip(config.windows, weights.layers, strict=True)]
    except _DenseMatrixError:
        return None
    frequencies, magnitude = rope_frequencies(config)
    return Decoder(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        frequencies=frequencies,
        magnitude=magnitude,
        epsilon=config.rms_norm_eps,
        embedding=embedding,
        layers=layers,
        norm=weights.norm,
        lm_head=lm_head,
    )


class _DenseMatrixError(Exception):
    """A matrix that is not quantised."""


def _matrix(linear: Linear) -> Matrix:
    if not isinstance(linear, QuantizedLinear):
        raise _DenseMatrixError
    return linear.matrix


def _layer(window: int, layer: LayerWeights) -> Layer:
    return Layer(
        window=window,
        attention_norm=layer.attention_norm,
        query_key_norm=layer.query_key_norm,
        mlp_norm=layer.mlp_norm,
        query_key_value=_matrix(layer.query_key_value),
        attention_output=_matrix(layer.attention_output),
        gate_up=_matrix(layer.gate_up),
        down=_matrix(layer.down),
    )
