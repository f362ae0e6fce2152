"""A Hugging Face folder: config.json and safetensors, in one file or in shards. Memory-mapped, never unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from pagestream.model.errors import ModelError, UnsupportedModelError
from pagestream.model.hf_config import parse_hf_config
from pagestream.model.quantization import Bits, Groups
from pagestream.model.tokenizer import load_tokenizer
from pagestream.model.tokenizer_base import Tokenizer

_INDEX: Final = "model.safetensors.index.json"
_DTYPES: Final = ("F32", "F16", "BF16")


class HfCheckpoint:
    """See `checkpoint.Checkpoint`. The files stay open: tensors are read from the mapped pages."""

    def __init__(self, folder: Path) -> None:
        generation = folder / "generation_config.json"
        self.name = folder.resolve().name
        self._folder = folder
        self.config = parse_hf_config(
            _read_json(folder / "config.json"), _read_json(generation) if generation.exists() else None
        )
        self.source_bytes = 0
        self.tensors: dict[str, tuple[int, ...]] = {}
        self._sources: dict[str, Any] = {}  # which open file holds a tensor
        self.files = tuple(_weight_files(folder))
        for file in self.files:
            self._add(file)
        for tensor in _indexed_tensors(folder):
            if tensor not in self.tensors:
                raise ModelError(f"{folder / _INDEX} names the tensor {tensor}, which none of its files holds")

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._sources[name].get_tensor(name)
        return tensor

    @property
    def group_bits(self) -> dict[str, Bits]:
        return {}

    def read_groups(self, name: str) -> Groups:
        raise KeyError(name)

    def load_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._folder)

    def _add(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read as safetensors, is it complete? ({error})") from error
        self.source_bytes += path.stat().st_size
        for tensor in file.keys():  # noqa: SIM118, safe_open is no mapping
            header = file.get_slice(tensor)
            if header.get_dtype() not in _DTYPES:
                raise UnsupportedModelError(
                    f"{path}: the tensor {tensor} has type {header.get_dtype()}, only {', '.join(_DTYPES)} are known"
                )
            self.tensors[tensor] = tuple(header.get_shape())
            self._sources[tensor] = file


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        return [folder / shard for shard in sorted(set(_indexed_tensors(folder).values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]
    if pickles:
        raise ModelError(
            f"{folder} holds pickled weights ({pickles[0].name}), which can run code when opened and are never read; "
            "convert them with transformers: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
        )
    raise ModelError(f"{folder} holds neither model.safetensors nor {_INDEX}")


def _indexed_tensors(folder: Path) -> dict[str, str]:
    """Tensor name to file name; empty where there is no index."""
    if not (folder / _INDEX).exists():
        return {}
    files = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ModelError(f"{folder / _INDEX}: weight_map must map tensor names to file names")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return values
