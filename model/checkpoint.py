"""A model on disk, whatever its format: a config, named tensors that are read one at a time, and a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from pagestream.model.checkpoint_gguf import GgufCheckpoint
from pagestream.model.checkpoint_hf import HfCheckpoint
from pagestream.model.config import ModelConfig
from pagestream.model.errors import ModelError, UnsupportedModelError, reading
from pagestream.model.quantization import Bits, Groups
from pagestream.model.tokenizer_base import Tokenizer
from pagestream.model.weights import expected_tensors


class Checkpoint(Protocol):
    @property
    def name(self) -> str:
        """For people: the name of the folder, or of the file without its suffix."""

    @property
    def files(self) -> tuple[Path, ...]:
        """What holds the tensors."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by Hugging Face name, from the headers alone. A tensor without such a name keeps its own."""

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensors on disk."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU: in the file's type from safetensors, dequantised to fp32 from GGUF. Query and key
        rows are in Hugging Face's order, where rotary positions turn the pairs (i, i + D/2).
        """

    @property
    def group_bits(self) -> Mapping[str, Bits]:
        """The tensors that `read_groups` reads, stored in groups as `quantization.Groups`."""

    def read_groups(self, name: str) -> Groups:
        """The tensor's own codes and scales, exactly; rows in the order of `read`."""

    def load_tokenizer(self) -> Tokenizer:
        """See `tokenizer.load_tokenizer`; a GGUF file is not read again."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads config and headers, no tensor data. Raises ModelError for what is not a model or cannot be read."""
    with reading(path):
        if path.is_dir():
            return HfCheckpoint(path)
        if path.suffix == ".gguf" and path.is_file():
            return GgufCheckpoint(path)
    found = "is neither" if path.exists() else "does not exist"
    raise ModelError(f"a model is a folder with config.json and *.safetensors, or a .gguf file; {path} {found}")


def check_tensors(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModelError naming the first tensor that is unknown, missing or of another shape."""
    expected = expected_tensors(checkpoint.config)
    for name, shape in checkpoint.tensors.items():
        if name not in expected and not _is_redundant(name, checkpoint.config):
            raise UnsupportedModelError(f"{checkpoint.name}: the tensor {name} {list(shape)} is not understood")
    for name, shape in expected.items():
        if name not in checkpoint.tensors:
            raise UnsupportedModelError(f"{checkpoint.name}: the tensor {name} {list(shape)} is missing")
        if checkpoint.tensors[name] != shape:
            raise UnsupportedModelError(
                f"{checkpoint.name}: the tensor {name} has shape {list(checkpoint.tensors[name])}, "
                f"the config says {list(shape)}"
            )


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Old checkpoints hold the rotary frequencies, which follow from the config, and a second tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)
