"""From a path to a runner that answers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pagestream.model import loader, native
from pagestream.model.batch import build_batch
from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.errors import ModelError, NotEnoughMemoryError
from pagestream.model.loader import LoadedModel, load_model
from pagestream.model.step import Chunk, SamplingParams, StepPlan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny-llama"), intermediate_size=64)


def save(path: Path, intermediate_size: int) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def load(folder: Path, **changes: Any) -> LoadedModel:
    arguments: dict[str, Any] = {
        "dtype": "fp32",
        "kv_dtype": "auto",
        "device": "cpu",
        "page_size": 16,
        "max_context": None,
        "token_budget": 64,
        "kv_memory": None,
    }
    return load_model(open_checkpoint(folder), **(arguments | changes))


def test_loads_reports_and_answers_as_transformers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO):
        loaded = load(folder, progress=lambda done, total: seen.append((done, total)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.name == folder.name
    assert loaded.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (loaded.dtype, loaded.kv_dtype, loaded.device, loaded.max_context) == ("fp32", "fp32", "cpu", 256)
    assert all(line in caplog.messages for line in loaded.plan.report())
    assert seen == sorted(seen)
    assert seen[-1] == (loaded.plan.weights_bytes, loaded.plan.weights_bytes)

    tokens = [3, 14, 15, 92, 65]
    chunk = Chunk("r", tokens, len(tokens), 0, len(tokens), [loaded.plan.num_pages - 1], SamplingParams())
    ((sampled,),) = loaded.runner.step(StepPlan((chunk,))).sampled
    with torch.no_grad():
        assert sampled.token_id == int(model(torch.tensor([tokens])).logits[0, -1].argmax())


def test_the_context_is_the_smaller_of_the_models_and_the_one_asked_for(folder: Path) -> None:
    assert load(folder, max_context=100).max_context == 100
    assert load(folder, max_context=10_000).max_context == 256


def test_int8_keys_and_values_keep_logits_close_and_need_a_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the network of operations, where matrices are fp32, and in the one of a single call."""
    tokens = [5, 17, 42, 3, 88, 21]
    for dtype in ("fp32", "int8"):
        exact, ours = (_logits(load(folder, dtype=dtype, kv_dtype=name), tokens) for name in ("bf16", "int8"))
        assert 0 < (ours - exact).norm() < 0.01 * exact.norm()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match="--kv-dtype int8 needs --device cpu"):
        load(folder, device="cuda", kv_dtype="int8")


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp16"])
def test_the_cache_may_be_narrower_than_the_weights(folder: Path, kv_dtype: str) -> None:
    loaded = load(folder, kv_dtype=kv_dtype)
    chunk = Chunk("r", [1, 2, 3], 3, 0, 3, [0], SamplingParams())
    assert loaded.runner.step(StepPlan((chunk,))).sampled[0]
    assert loaded.kv_dtype == kv_dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp8"}, "--dtype fp8"),
        ({"kv_dtype": "int4"}, "--kv-dtype int4"),
        ({"device": "cuda"}, "--device cuda"),
    ],
)
def test_names_the_option_that_cannot_be(
    folder: Path, change: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=message):
        load(folder, **change)


def test_too_little_memory_is_refused_before_a_tensor_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "available_memory", lambda _device: 1000)
    monkeypatch.setattr(loader, "build_weights", None)
    with pytest.raises(NotEnoughMemoryError):
        load(folder)


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 0.02), ("int4", 0.25)])
def test_safetensors_are_quantized_on_request(folder: Path, dtype: str, tolerance: float) -> None:
    """All matrices of this model divide into groups; norms stay as they are. The plan counts what is stored."""
    stored: list[int] = []
    loaded = load(folder, dtype=dtype, progress=lambda done, _total: stored.append(done))
    assert (loaded.dtype, loaded.kv_dtype) == (dtype, "int8")
    assert stored[-1] == loaded.plan.weights_bytes
    assert loaded.plan.weights_bytes < load(folder).plan.weights_bytes * (0.28 if dtype == "int8" else 0.23)
    tokens = [5, 17, 42, 3, 88, 21]
    exact, ours = (_logits(load(folder, dtype=name, kv_dtype="fp32"), tokens) for name in ("fp32", dtype))
    assert 0 < (ours - exact).abs().mean() < tolerance * exact.abs().mean()


def test_only_the_compiled_decoder_makes_answers_independent_of_their_company(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where a matrix stays dense, because its inputs do not divide into groups, nor without a compiler."""
    assert load(folder, dtype="int8").is_row_invariant == native.has_decoder()
    assert not load(folder, dtype="fp32").is_row_invariant
    assert not load(save(tmp_path, intermediate_size=72), dtype="int8").is_row_invariant
    monkeypatch.setattr(native, "has_decoder", lambda: False)
    assert not load(folder, dtype="int8").is_row_invariant


def _logits(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    chunk = Chunk("a", tokens, len(tokens), 0, len(tokens), range(1), SamplingParams())
    batch = build_batch(StepPlan((chunk,)), 16, torch.device("cpu"))
    return loaded.runner._network.outputs(batch, loaded.runner._cache).logits
