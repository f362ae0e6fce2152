"""Weights that stay quantised: repacked exactly, rounded well, and a network that still agrees."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from pagestream.model.batch import build_batch
from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.linear import DenseLinear, QuantizedLinear, pack_matrices
from pagestream.model.loader import LoadedModel, load_model
from pagestream.model.quantization import Groups, choose_bits, quantize
from pagestream.model.step import Chunk, SamplingParams, StepPlan
from pagestream.model.tokenizer import load_tokenizer

CPU = torch.device("cpu")


def looked_up(groups: Groups) -> torch.Tensor:
    return QuantizedLinear(pack_matrices([groups]), None, torch.float32).lookup(torch.arange(len(groups.codes)))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_is_within_half_a_step(bits: int) -> None:
    matrix = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    matrix[3, 32:64] = 0.0
    matrix[4, :32] = 0.5
    groups = matrix.unflatten(1, (-1, 32))
    step = groups.abs().amax(-1) / 127 if bits == 8 else (groups.amax(-1) - groups.amin(-1)) / 15
    error = (looked_up(quantize(matrix, bits)) - matrix).unflatten(1, (-1, 32)).abs().amax(-1)
    rounding = 2**-10 * groups.abs().amax(-1)  # scales and mins are float16, 15 or 127 steps of them add up
    assert (error <= 0.5 * step + 2 * rounding).all()


def test_which_tensors_are_quantized() -> None:
    shapes = {
        "model.embed_tokens.weight": (96, 64),
        "model.layers.0.mlp.up_proj.weight": (48, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 48),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (96, 64),
    }
    assert choose_bits(shapes, 4, {"model.layers.0.self_attn.q_proj.weight": 8, "lm_head.weight": 4}) == {
        "model.embed_tokens.weight": 8,
        "model.layers.0.mlp.up_proj.weight": 4,
        "model.layers.0.self_attn.q_proj.weight": 8,  # the file's own
        "lm_head.weight": 4,  # the file's own
    }


def test_parts_of_different_bits_are_one_linear() -> None:
    """Files keep some of the stacked projections at more bits than others."""
    matrices = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (24, 8, 8)]
    groups = [quantize(matrix, bits) for matrix, bits in zip(matrices, (4, 4, 8), strict=True)]
    bias, rows = torch.randn(40), torch.randn(3, 64)
    linear = QuantizedLinear(pack_matrices(groups), bias, torch.float32)
    exact = DenseLinear(torch.cat([looked_up(g) for g in groups]), bias)(rows)
    assert (linear(rows) - exact).abs().max() < 0.02 * exact.abs().max()
    many = torch.randn(200, 64)
    assert (linear(many) - torch.cat([linear(row[None]) for row in many])).abs().max() < 0.05 * many.abs().max() * 8


def test_the_default_models_tensors_are_repacked_exactly(default_model_path: Path) -> None:
    """Against gguf's own dequantisation; query and key rows through the order that `read` is tested for."""
    checkpoint = open_checkpoint(default_model_path)
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(default_model_path).tensors}
    assert kinds == {"F32", "Q4_1", "Q8_0"}
    names = [f"model.layers.7.{n}.weight" for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    for name in ["model.embed_tokens.weight", *names]:
        assert torch.equal(looked_up(checkpoint.read_groups(name)), checkpoint.read(name))


def load(path: Path, dtype: str, cache_dir: Path | None = None) -> LoadedModel:
    return load_model(
        open_checkpoint(path),
        dtype=dtype,
        kv_dtype="fp32",
        device="cpu",
        page_size=32,
        max_context=512,
        token_budget=512,
        kv_memory=32 << 20,
        cache_dir=cache_dir,
    )


def logits(loaded: LoadedModel, tokens: list[int], chunk: int) -> torch.Tensor:
    """[T - 1, V]: the logits after every token but the last, computed `chunk` tokens at a time."""
    network, cache, rows = loaded.runner._network, loaded.runner._cache, []
    for start in range(0, len(tokens) - 1, chunk):
        length = min(chunk, len(tokens) - 1 - start)
        step = Chunk("a", tokens, len(tokens), start, length, range(16), SamplingParams())
        batch = build_batch(StepPlan((step,)), 32, CPU)
        object.__setattr__(batch, "sampled_rows", torch.arange(length))
        rows.append(network.outputs(batch, cache).logits)
    return torch.cat(rows)


def test_perplexity_stays_that_of_the_same_weights_in_fp32(default_model_path: Path) -> None:
    """Only the rounding of activations is new: the weights are the file's own, bit for bit."""
    text = (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text()
    tokens = load_tokenizer(default_model_path).encode(text, add_special_tokens=False)[:400]
    targets = torch.tensor(tokens[1:])[:, None]

    def mean_loss(rows: torch.Tensor) -> float:
        return -rows.log_softmax(-1).gather(1, targets).mean().item()

    loaded = load(default_model_path, "int4")
    exact = logits(load(default_model_path, "fp32"), tokens, 399)
    for chunk in (64, 399):
        quantized = logits(loaded, tokens, chunk)
        assert abs(mean_loss(quantized) - mean_loss(exact)) < 0.02
        assert (quantized.argmax(-1) == exact.argmax(-1)).float().mean() > 0.93
    assert loaded.plan.weights_bytes < 100e6


def test_a_start_from_packed_weights_gives_the_same_logits(default_model_path: Path, tmp_path: Path) -> None:
    tokens = torch.arange(1000, 1040).tolist()
    uncached = logits(load(default_model_path, "int4"), tokens, chunk=20)
    for _ in range(2):  # packs and keeps; maps what was kept
        assert torch.equal(logits(load(default_model_path, "int4", tmp_path), tokens, chunk=20), uncached)
    assert len(list((tmp_path / "packed").iterdir())) == 1
