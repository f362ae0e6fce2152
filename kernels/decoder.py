"""A whole step of a network whose matrices are quantised, in one call: no Python between layers. CPU only, and only
where the kernels are compiled; what it must equal is the same network as PyTorch operations over the other operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagestream.kernels import build, packing
from pagestream.kernels.checks import check_dense, check_dtype, check_packed, check_shape, check_window
from pagestream.kernels.outputs import FIELDS, Outputs
from pagestream.kernels.summary import Observation

_MAX_PARTS = 3
_PART_FIELDS = 5
_UNOBSERVED = (None,) * len(Observation._fields)

torch.library.define(
    "pagestream::decode",
    "(Tensor model, float epsilon, float magnitude, Tensor token_ids, Tensor positions, Tensor slots, "
    "Tensor query_starts, Tensor context_lengths, Tensor block_tables, Tensor sampled_rows, int prefill_rows, "
    "Tensor(a!) caches, Tensor(b!)? scales, Tensor(c!) logits, Tensor(d!) summary, Tensor? with_statistics, "
    "Tensor(e!) seconds, Tensor? observed, Tensor? spans, Tensor(f!)? means, Tensor(g!)? page_masses, "
    "Tensor(h!)? span_shares) -> ()",
)


@dataclass(frozen=True, slots=True)
class Part:
    """A weight [N, K]."""

    packed: packing.Packed
    outputs: int  # N


@dataclass(frozen=True, slots=True)
class Matrix:
    """One to three parts under each other, and a bias float32 [N of all parts]."""

    parts: tuple[Part, ...]
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Layer:
    """Hq, Hkv: query and key/value heads; D: head size; E: hidden size; F: intermediate size. Vectors are float32."""

    window: int  # 0: none
    attention_norm: Tensor  # [E]
    query_key_norm: Tensor | None  # [Hq + Hkv, D]
    mlp_norm: Tensor  # [E]
    query_key_value: Matrix  # [(Hq + 2 Hkv) D, E]
    attention_output: Matrix  # [E, Hq D]
    gate_up: Matrix  # [2 F, E]
    down: Matrix  # [E, F]


def has_decoder() -> bool:
    """Whether `Decoder` works in this process."""
    return build.load().implementation == "cpp"


class Decoder:
    """Checked once, here; a call checks only what it brings. Raises ValueError for a wrong dtype, layout or shape.

    `frequencies` float32 [D / 2]: radians per position of each pair of dimensions; `magnitude`: factor of cosine and
    sine; `epsilon`: of all norms. `embedding` has one part and no bias, `lm_head` no bias.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        frequencies: Tensor,
        magnitude: float,
        epsilon: float,
        embedding: Matrix,
        layers: Sequence[Layer],
        norm: Tensor,
        lm_head: Matrix,
    ) -> None:
        head_size, hidden = 2 * len(frequencies), len(norm)
        vocabulary, intermediate = _outputs(embedding), _outputs(layers[0].gate_up) // 2
        _check_vector("frequencies", frequencies, head_size // 2)
        _check_vector("norm", norm, hidden)
        _check_matrix("embedding", embedding, vocabulary, hidden)
        _check_matrix("lm_head", lm_head, vocabulary, hidden)
        if len(embedding.parts) > 1 or embedding.bias is not None or lm_head.bias is not None:
            raise ValueError("embedding must have one part, and neither it nor lm_head a bias")
        if num_heads % num_kv_heads != 0 or head_size % 8 != 0:
            raise ValueError(f"{num_heads} heads of {head_size} cannot share {num_kv_heads} key/value heads")
        for index, layer in enumerate(layers):
            _check_layer(f"layer {index}: ", layer, num_heads, num_kv_heads, head_size, hidden, intermediate)
        numbers = [len(layers), num_heads, num_kv_heads, head_size, hidden, intermediate, vocabulary]
        numbers += [_pointer(frequencies), _pointer(norm), *_matrix_fields(embedding), *_matrix_fields(lm_head)]
        for layer in layers:
            numbers += _layer_fields(layer)
        self._model = torch.tensor(numbers, dtype=torch.int64)  # as decoder_params.h reads it
        self._keeps_alive = (frequencies, norm, embedding, lm_head, tuple(layers))
        self._epsilon, self._magnitude = epsilon, magnitude
        self._num_layers, self._vocabulary = len(layers), vocabulary
        self._num_heads = num_heads
        self._seconds = torch.zeros(2, dtype=torch.float64)

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        query_starts: Tensor,
        context_lengths: Tensor,
        block_tables: Tensor,
        sampled_rows: Tensor,
        *,
        prefill_rows: int = 0,
        with_statistics: Tensor | None = None,
        caches: Tensor,
        scales: Tensor | None = None,
        observation: Observation | None = None,
    ) -> Outputs:
        """Of `sampled_rows` int64 [R], which increase; keys and values of all rows are stored.

        `token_ids`, `positions`, `slots` int64 [T]; `query_starts`, `context_lengths`, `block_tables` and slots as
        `paged_attention` and `store_kv` take them. `caches` [L, P, Hkv, 2, B, D]: for each layer, page and head the
        keys, then the values; those of int8 need `scales` float32 [L, P, Hkv, 2, B]. The last `prefill_rows` rows are
        multiplied as `quantized_linear` says, all but in `lm_head`. `with_statistics` bool [R]: see outputs.py. A row's
        result depends on which of the two kinds it and those before it are of, not on the rows beside it, nor on the
        number of threads. `observation` receives what it asks for and changes no bit.
        Raises ValueError for a wrong dtype, layout or shape and for ids that point outside; then nothing is written.
        """
        if observation is not None:
            observation.check(self._num_layers, self._num_heads, block_tables.shape[1])
        # Not torch.empty, which lets go of the interpreter: others would take it before the kernels run.
        logits = torch.from_numpy(np.empty((len(sampled_rows), self._vocabulary), np.float32))
        summary = torch.from_numpy(np.empty((len(sampled_rows), len(FIELDS))))
        torch.ops.pagestream.decode.default(
            self._model,
            self._epsilon,
            self._magnitude,
            token_ids,
            positions,
            slots,
            query_starts,
            context_lengths,
            block_tables,
            sampled_rows,
            prefill_rows,
            caches,
            scales,
            logits,
            summary,
            with_statistics,
            self._seconds,
            *(observation or _UNOBSERVED),
        )
        attention, products = self._seconds.tolist()
        return Outputs(logits, summary, (attention, products))


def _check_layer(
    where: str, layer: Layer, num_heads: int, num_kv_heads: int, head_size: int, hidden: int, intermediate: int
) -> None:
    queries = num_heads * head_size
    check_window(layer.window)
    _check_vector(where + "attention_norm", layer.attention_norm, hidden)
    _check_vector(where + "mlp_norm", layer.mlp_norm, hidden)
    if layer.query_key_norm is not None:
        _check_vector(where + "query_key_norm", layer.query_key_norm, num_heads + num_kv_heads, head_size)
    heads = (num_heads + 2 * num_kv_heads) * head_size
    _check_matrix(where + "query_key_value", layer.query_key_value, heads, hidden)
    _check_matrix(where + "attention_output", layer.attention_output, hidden, queries)
    _check_matrix(where + "gate_up", layer.gate_up, 2 * intermediate, hidden)
    _check_matrix(where + "down", layer.down, hidden, intermediate)


def _check_vector(name: str, vector: Tensor, *shape: int) -> None:
    check_dtype(torch.float32, (name, vector))
    check_dense((name, vector), dims=len(shape), dense=len(shape))
    check_shape((name, vector, shape))


def _check_matrix(name: str, matrix: Matrix, outputs: int, inputs: int) -> None:
    if not 1 <= len(matrix.parts) <= _MAX_PARTS or _outputs(matrix) != outputs:
        raise ValueError(f"{name} has {len(matrix.parts)} parts of {_outputs(matrix)} outputs in all, not {outputs}")
    for part in matrix.parts:
        check_packed(*part.packed)
        blocks = -(-part.outputs // packing.BLOCK)
        if inputs % packing.GROUP or part.packed.codes.shape[:2] != (blocks, inputs // packing.GROUP):
            raise ValueError(f"{name} is packed as {tuple(part.packed.codes.shape)}, not for {part.outputs} x {inputs}")
    if matrix.bias is not None:
        _check_vector(name + "'s bias", matrix.bias, outputs)


def _outputs(matrix: Matrix) -> int:
    return sum(part.outputs for part in matrix.parts)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _layer_fields(layer: Layer) -> Iterator[int]:
    yield from (layer.window, *map(_pointer, (layer.attention_norm, layer.query_key_norm, layer.mlp_norm)))
    for matrix in (layer.query_key_value, layer.attention_output, layer.gate_up, layer.down):
        yield from _matrix_fields(matrix)


def _matrix_fields(matrix: Matrix) -> list[int]:
    fields = [_pointer(matrix.bias)]
    for part in matrix.parts:
        fields += [*map(_pointer, part.packed), part.packed.codes.shape[1], part.outputs]
    return fields + [0] * (_PART_FIELDS * (_MAX_PARTS - len(matrix.parts)))
