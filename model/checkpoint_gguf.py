"""A GGUF file. The `gguf` package parses it and turns quantised blocks to fp32; names and row order become
Hugging Face's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from pagestream.model.errors import ModelError, UnsupportedModelError, reading
from pagestream.model.gguf_config import parse_gguf_config
from pagestream.model.quantization import Bits, Groups
from pagestream.model.tokenizer_base import Tokenizer

if TYPE_CHECKING:
    from gguf import ReaderTensor

_TYPES: Final = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
_GROUP_BITS: Final[dict[str, Bits]] = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}  # what `quantization.Groups` holds exactly
_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_rot_embd": "self_attn.rotary_emb.inv_freq",
}
_ROPE_DIVISORS: Final = "rope_freqs.weight"


class GgufCheckpoint:
    """See `checkpoint.Checkpoint`. The file stays mapped; `read` dequantises one tensor."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.files = (path,)
        from pagestream.model.gguf_file import open_gguf  # noqa: PLC0415, imports the gguf package

        self._reader = reader = open_gguf(path)
        sources = {tensor.name: tensor for tensor in reader.tensors}
        for tensor in reader.tensors:
            if tensor.tensor_type.name not in _TYPES:
                raise UnsupportedModelError(
                    f"{path}: the tensor {tensor.name} has type {tensor.tensor_type.name}, "
                    f"only {', '.join(_TYPES)} are known"
                )
        divisors = sources.pop(_ROPE_DIVISORS, None)
        embedding = sources.get("token_embd.weight")
        if embedding is None:
            raise ModelError(f"{path}: the tensor token_embd.weight is missing")
        try:
            self.config = parse_gguf_config(
                {key: field.contents() for key, field in reader.fields.items() if not _is_bulky(key)},
                sources.keys(),
                int(embedding.shape[-1]),
                None if divisors is None else _dequantize(divisors),
            )
        except ModelError as error:
            raise type(error)(f"{path}: {error}") from None
        self._permuted = reader.fields["general.architecture"].contents() == "llama"
        self._sources = {_hugging_face_name(name): tensor for name, tensor in sources.items()}
        self.tensors = {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in self._sources.items()}
        self.source_bytes = sum(int(tensor.n_bytes) for tensor in self._sources.values())

    def load_tokenizer(self) -> Tokenizer:
        from pagestream.model.tokenizer_gguf import gguf_tokenizer  # noqa: PLC0415, imports the gguf package

        with reading(self.files[0]):
            return gguf_tokenizer(self._reader)

    @property
    def group_bits(self) -> dict[str, Bits]:
        return {
            name: _GROUP_BITS[tensor.tensor_type.name]
            for name, tensor in self._sources.items()
            if tensor.tensor_type.name in _GROUP_BITS
        }

    def read(self, name: str) -> torch.Tensor:
        return self._hugging_face_rows(name, _dequantize(self._sources[name]))

    def read_groups(self, name: str) -> Groups:
        return _groups(self._sources[name]).select(lambda rows: self._hugging_face_rows(name, rows))

    def _hugging_face_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        if self._permuted and ".q_proj." in name:
            return _rotate_half_order(rows, self.config.num_heads)
        if self._permuted and ".k_proj." in name:
            return _rotate_half_order(rows, self.config.num_kv_heads)
        return rows


def _is_bulky(key: str) -> bool:
    """The vocabulary: long lists that only the tokenizer needs."""
    return key.startswith("tokenizer.") and not key.endswith("_token_id")


def _hugging_face_name(name: str) -> str:
    """A name that is not known stays as it is, for `check_tensors` to refuse."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    prefix = f"model.layers.{match[1]}." if match[1] else ""
    return f"{prefix}{_NAMES[match[2]]}.{match[3]}"


def _dequantize(tensor: ReaderTensor) -> torch.Tensor:
    from gguf.quants import dequantize  # noqa: PLC0415, needed for these files alone

    # A copy where the values are the mapped file's own (F32): torch wants memory it may write to.
    return torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), np.float32, "W"))


def _groups(tensor: ReaderTensor) -> Groups:
    """Blocks of 32 weights: Q8_0 a float16 scale and 32 signed bytes; Q4_0 a scale and 16 bytes of two codes each, the
    first half of the block in the low nibbles, worth scale * (code - 8); Q4_1 the same with a float16 min after the
    scale, worth scale * code + min. -8 * scale is exact in float16, so Q4_0 becomes the form of Q4_1.
    """
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[tensor.tensor_type.name]
    blocks = np.ascontiguousarray(tensor.data).reshape(len(tensor.data), -1, size)  # [N, K / 32, size]
    scales = torch.from_numpy(blocks[..., :2].copy()).view(torch.float16)[..., 0]
    if size == 34:
        return Groups(torch.from_numpy(blocks[..., 2:] ^ 128).flatten(1), scales, None)
    packed = torch.from_numpy(blocks[..., size - 16 :].copy())
    codes = torch.cat((packed & 15, packed >> 4), dim=-1).flatten(1)
    if size == 18:
        return Groups(codes, scales, -8 * scales)
    return Groups(codes, scales, torch.from_numpy(blocks[..., 2:4].copy()).view(torch.float16)[..., 0])


def _rotate_half_order(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp keeps the two rows of a rotary pair next to each other (2i, 2i + 1), Hugging Face half a head apart
    (i, i + D/2). Rows [H * D, ...], of a weight or a bias.
    """
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
