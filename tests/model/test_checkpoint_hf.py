"""Hugging Face folders, written by transformers itself and then damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from pagestream.model.checkpoint import check_tensors, open_checkpoint
from pagestream.model.errors import ModelError, UnsupportedModelError

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, **config: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    values = transformers.AutoConfig.for_model(model_type, **(SIZES | config))
    return transformers.AutoModelForCausalLM.from_config(values, dtype=dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path) | changes
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize(
    ("model_type", "dtype", "config"),
    [
        ("llama", torch.float32, {"attention_bias": True, "mlp_bias": True}),
        ("llama", torch.float16, {"tie_word_embeddings": True}),
        ("mistral", torch.bfloat16, {"sliding_window": 16}),
        ("qwen2", torch.bfloat16, {}),
        ("qwen3", torch.float32, {"tie_word_embeddings": True}),
    ],
)
def test_reads_back_what_transformers_saved(
    tmp_path: Path, model_type: str, dtype: torch.dtype, config: dict[str, Any], max_shard_size: str
) -> None:
    model = tiny_model(model_type, dtype, **config)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")

    checkpoint = open_checkpoint(tmp_path)
    check_tensors(checkpoint)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert dict(checkpoint.tensors) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        read = checkpoint.read(name)
        assert read.dtype == dtype
        assert torch.equal(read, tensor)
    assert checkpoint.name == tmp_path.name
    assert checkpoint.source_bytes >= sum(tensor.nbytes for tensor in state.values())


def test_tensors_that_follow_from_the_config_are_redundant(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    extra = {"lm_head.weight": torch.zeros(96, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite_tensors(tmp_path, **extra)
    check_tensors(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.0.mlp.router.weight", torch.zeros(4, 32), "model.layers.0.mlp.router.weight .*not understood"),
        ("model.norm.weight", None, "model.norm.weight .*is missing"),
        ("lm_head.weight", None, "lm_head.weight .*is missing"),
        ("model.layers.1.mlp.up_proj.weight", torch.zeros(40, 32), r"up_proj.weight has shape \[40, 32\].*\[48, 32\]"),
        ("model.layers.1.self_attn.q_proj.bias", torch.zeros(32), "layers.1.self_attn.q_proj.bias .*not understood"),
    ],
)
def test_refuses_a_tensor_by_name(folder: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    rewrite_tensors(folder, **{name: tensor})
    with pytest.raises(UnsupportedModelError, match=message):
        check_tensors(open_checkpoint(folder))


def test_refuses_a_type_by_name(folder: Path) -> None:
    rewrite_tensors(folder, **{"model.norm.weight": torch.ones(32, dtype=torch.float64)})
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight has type F64"):
        open_checkpoint(folder)


def test_generation_config_is_read(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert open_checkpoint(folder).config.eos_token_ids == (2, 5)


@pytest.mark.parametrize("keep", [0, 4, 200, 5000])
def test_truncated_safetensors_is_one_clear_error(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read as safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", '{"model_type": "llama"', "[]", "\x80"])
def test_malformed_config_is_one_clear_error(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(folder)


def test_missing_shard_and_missing_tensor_are_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    good = index.read_text()
    values = json.loads(good)
    values["weight_map"]["model.extra.weight"] = values["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"model\.extra\.weight"):
        open_checkpoint(tmp_path)
    index.write_text(good)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        open_checkpoint(tmp_path)
    index.write_text('{"weight_map": []}')
    with pytest.raises(ModelError, match="weight_map"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=rf"{re.escape(name)}.*never read.*save_pretrained"):
        open_checkpoint(folder)
    with pytest.raises(ModelError, match=r"or a \.gguf file; .* is neither"):
        open_checkpoint(folder / name)


def test_anything_else_says_what_a_model_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match=r"\.gguf file; .*model\.onnx is neither"):
        open_checkpoint(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="does not exist"):
        open_checkpoint(tmp_path / "absent.gguf")


def test_an_unsupported_config_is_refused_before_any_tensor(folder: Path) -> None:
    rewrite_config(folder, attention_sink=4)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="attention_sink"):
        open_checkpoint(folder)
