"""GGUF files, written here with gguf's own writer; the oracles are gguf's decoder and transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as GgmlType
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from pagestream.model.checkpoint import check_tensors, open_checkpoint
from pagestream.model.errors import ModelError, UnsupportedModelError
from pagestream.model.gguf_file import open_gguf
from pagestream.model.kv_cache import KVCache
from pagestream.model.linear import QuantizedLinear, pack_matrices
from pagestream.model.runner import Runner
from pagestream.model.step import Chunk, SamplingParams, StepPlan
from pagestream.model.weights import build_weights, expected_tensors

# Rows of 256 elements: one block of the K types.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PARTS = {  # Hugging Face's name, GGUF's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
QUANTIZABLE = (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0)
QUANTIZABLE += (GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1)
K_TYPES = (GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K)


def tiny_model(model_type: str, **config: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    values = transformers.AutoConfig.for_model(model_type, **(SIZES | config))
    model = transformers.AutoModelForCausalLM.from_config(values, dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms start as constants, which would hide a mix-up
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model.eval()


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows of the llama architecture."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    quant: GgmlType = GgmlType.F32,
    *,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, tuple[np.ndarray, GgmlType] | None] | None = None,
) -> Path:
    """`model` as llama.cpp's converter would write it; `extra` metadata and `tensors` replace, add or (None) drop."""
    config = model.config
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    metadata = {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | (extra or {})
    blobs: dict[str, tuple[np.ndarray, GgmlType] | None] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        if arch == "llama" and (".q_proj" in name or ".k_proj" in name):
            data = interleaved(data, config.num_attention_heads if ".q_" in name else config.num_key_value_heads)
        kind = quant if data.ndim == 2 else GgmlType.F32
        blobs[gguf_name(name)] = (gguf.quants.quantize(data, kind), kind)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    for name, blob in (blobs | (tensors or {})).items():
        if blob is not None:
            writer.add_tensor(name, blob[0], raw_dtype=blob[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("quant", QUANTIZABLE, ids=lambda quant: quant.name)
@pytest.mark.parametrize(
    ("model_type", "config"),
    [("llama", {"attention_bias": True}), ("mistral", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {})],
)
def test_reads_what_was_written(tmp_path: Path, quant: GgmlType, model_type: str, config: dict[str, Any]) -> None:
    """Dequantising commutes with the row order, so the oracle quantises the Hugging Face rows."""
    model = tiny_model(model_type, **config)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", model, quant))
    check_tensors(checkpoint)
    assert checkpoint.name == "tiny"
    assert checkpoint.tensors.keys() == expected_tensors(checkpoint.config).keys()
    for name in checkpoint.tensors:
        source = model.state_dict()[name].numpy()
        kind = quant if source.ndim == 2 else GgmlType.F32
        expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(source, kind), kind).copy())
        assert torch.equal(checkpoint.read(name), expected)
        if name in checkpoint.group_bits:  # kept quantised: the same numbers, in the same rows
            groups = QuantizedLinear(pack_matrices([checkpoint.read_groups(name)]), None, torch.float32)
            assert torch.equal(groups.lookup(torch.arange(len(expected))), expected)
    matrices = {name for name, shape in checkpoint.tensors.items() if len(shape) == 2}
    assert checkpoint.group_bits.keys() == (matrices if quant.name in ("Q4_0", "Q4_1", "Q8_0") else set())


@pytest.mark.parametrize("quant", K_TYPES, ids=lambda quant: quant.name)
def test_reads_blocks_of_the_k_types(tmp_path: Path, quant: GgmlType) -> None:
    """The package cannot quantise to these, so the blocks are random bytes with small half-precision scales."""
    block, size = gguf.GGML_QUANT_SIZES[quant]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (256, SIZES["intermediate_size"] // block * size), dtype=np.uint8)
    scales = rng.uniform(1e-3, 1e-2, (256, 2)).astype(np.float16).view(np.uint8)
    data[:, -2:] = scales[:, -2:]  # Q6_K keeps its one scale last
    if quant is not GgmlType.Q6_K:
        data[:, :4] = scales
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), tensors={"blk.1.ffn_down.weight": (data, quant)})
    read = open_checkpoint(path).read("model.layers.1.mlp.down_proj.weight")
    assert read.shape == (256, 256)
    assert read.isfinite().all()
    assert torch.equal(read, torch.from_numpy(gguf.quants.dequantize(data, quant)))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_of_an_exported_model_are_transformers(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    window = {"llama.attention.sliding_window": 4} if model_type == "mistral" else {}
    model.config.sliding_window = 4 if window else None
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", model, extra=window))
    cpu = torch.device("cpu")
    weights = build_weights(checkpoint.config, checkpoint.read, torch.float32, cpu)
    runner = Runner(checkpoint.config, weights, KVCache(checkpoint.config, 2, 16, torch.float32, cpu))
    tokens = [5, 17, 80, 3, 42, 9, 9, 61]
    chunk = Chunk("r", tokens, len(tokens), 0, len(tokens), [1], SamplingParams(logprobs=96))
    ((sampled,),) = runner.step(StepPlan((chunk,))).sampled
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(dim=-1)
    ours = torch.tensor([logprob for _, logprob in sorted(sampled.top_logprobs)])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_default_model_equals_transformers(default_model_path: Path) -> None:
    """The oracle reads the same file with its own code: every tensor bitwise the same."""
    checkpoint = open_checkpoint(default_model_path)
    check_tensors(checkpoint)
    config = transformers.LlamaConfig(  # of HuggingFaceTB/SmolLM2-135M-Instruct
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    # Only the names are wanted of the model; without its modules, transformers does not map them over and over.
    names = SimpleNamespace(config=config, state_dict=model.state_dict, named_children=list)
    theirs = load_gguf_checkpoint(str(default_model_path), return_tensors=True, model_to_load=names)["tensors"]
    assert theirs.keys() == checkpoint.tensors.keys()
    for name, tensor in theirs.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    ours = checkpoint.config
    assert (ours.num_layers, ours.num_heads, ours.num_kv_heads, ours.head_dim) == (30, 9, 3, 64)
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size) == (49152, 576, 1536)
    assert (ours.max_position, ours.rope_theta, ours.eos_token_ids) == (8192, 100000.0, (2,))
    assert ours.rms_norm_eps == pytest.approx(1e-5)
    assert ours.tie_word_embeddings


def test_rope_divisors_are_settings_and_no_weight(tmp_path: Path) -> None:
    def write(value: float) -> Path:
        tensors = {"rope_freqs.weight": (np.full(32, value, dtype=np.float32), GgmlType.F32)}
        return write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), tensors=tensors)

    check_tensors(open_checkpoint(write(1.0)))
    with pytest.raises(UnsupportedModelError, match=r"tiny\.gguf: rope_freqs\.weight"):
        open_checkpoint(write(2.0))


def test_refuses_a_key_by_file_and_name(tmp_path: Path) -> None:
    extra = {"llama.attn_logit_softcapping": 30.0}
    with pytest.raises(UnsupportedModelError, match=r"tiny\.gguf.*attn_logit_softcapping"):
        open_checkpoint(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra=extra))


def test_foreign_keys_outside_the_architecture_do_not_matter(tmp_path: Path) -> None:
    extra = {"general.license": "apache-2.0", "quantize.imatrix.file": "x", "tokenizer.ggml.model": "gpt2"}
    check_tensors(open_checkpoint(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra=extra)))


def test_refuses_tensors_and_types_by_name(tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "tiny.gguf"
    row = np.zeros((256, 256), dtype=np.float32)
    for name, blob, message in (
        ("blk.0.ffn_gate_exps.weight", (row, GgmlType.F32), "blk.0.ffn_gate_exps.weight .*not understood"),
        ("blk.0.ffn_down.weight", None, r"model.layers.0.mlp.down_proj.weight \[256, 256\] is missing"),
        ("blk.1.ffn_up.weight", (row[:64], GgmlType.F32), r"mlp.up_proj.weight has shape \[64, 256\]"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            check_tensors(open_checkpoint(write_gguf(path, model, tensors={name: blob})))
    blocks = gguf.quants.quantize(row, GgmlType.TQ1_0)
    write_gguf(path, model, tensors={"blk.0.ffn_up.weight": (blocks, GgmlType.TQ1_0)})
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.ffn_up\.weight has type TQ1_0"):
        open_checkpoint(path)
    write_gguf(path, model, tensors={"token_embd.weight": None})
    with pytest.raises(ModelError, match=r"token_embd\.weight"):
        open_checkpoint(path)


def test_any_truncation_is_one_clear_error(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    whole = path.read_bytes()
    ends = [*range(0, 3000, 41), len(whole) // 2, len(whole) - 40]
    for end in ends:
        path.write_bytes(whole[:end])
        with pytest.raises(ModelError, match=r"tiny\.gguf cannot be read as GGUF"):
            open_checkpoint(path)


def test_a_damaged_header_is_refused_or_harmless(tmp_path: Path) -> None:
    """Random bytes anywhere in the header: ModelError or a readable file, never another error, never a hang."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = whole.copy()
        damaged[rng.integers(0, 2500, 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            check_tensors(open_checkpoint(path))
        except ModelError:
            refused += 1
    assert refused > 50


def test_split_files_say_how_to_join(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra={"split.count": 2})
    with pytest.raises(ModelError, match="gguf-split --merge"):
        open_checkpoint(path)


def test_the_tokenizer_comes_from_the_file_as_it_was_opened(default_model_path: Path, tmp_path: Path) -> None:
    """One reading serves weights and tokenizer: the file may be gone by then."""
    path = tmp_path / "linked.gguf"
    path.symlink_to(default_model_path)
    checkpoint = open_checkpoint(path)
    path.unlink()
    ours = checkpoint.load_tokenizer()
    assert ours.vocab_size == checkpoint.config.vocab_size
    for text in ("Why is the sky blue?", "naïve 東京 🌹 1815"):
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


def test_metadata_is_what_the_package_reads(default_model_path: Path) -> None:
    """Lists are read by our own code: strings, integers and floats, against the package's."""
    ours, theirs = open_gguf(default_model_path).fields, gguf.GGUFReader(default_model_path).fields
    assert {key: field.contents() for key, field in ours.items()} == {k: f.contents() for k, f in theirs.items()}
    assert any(isinstance(field.contents(), list) for field in ours.values())
