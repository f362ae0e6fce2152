"""The default model's GGUF file as a Hugging Face folder in bf16, which the peers' converters read.

usage: export_hf.py MODEL.gguf FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers


def export(source: Path, folder: Path) -> None:
    """Transformers saves no model that it loaded from GGUF: its state goes into a new one. The converters' transformers
    versions differ, so the configuration and the tokenizer are written in the form that all of them read."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(source.parent, gguf_file=source.name, dtype=torch.float32)
    told = loaded.config.to_dict()
    kept = {name: value for name, value in told.items() if name not in ("quantization_config", "transformers_version")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**kept)).bfloat16()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    rope = loaded.config.rope_parameters
    _change(folder / "config.json", {"rope_theta": rope["rope_theta"], "torch_dtype": "bfloat16"}, "rope_parameters")
    _change(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _change(path: Path, new: dict[str, object], *removed: str) -> None:
    settings = {name: value for name, value in json.loads(path.read_text()).items() if name not in removed}
    path.write_text(json.dumps(settings | new, indent=1) + "\n")


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
