"""The whole model on each device, against transformers on a CPU: a batch of prompts, then decodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.loader import load_model
from pagestream.model.step import Chunk, SamplingParams, StepPlan

PROMPTS = [[5, 6, 7], list(range(20, 75)), [300]]
NEW_TOKENS = 20
PAGES_EACH = 8


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 0.3)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_greedy_answers_are_as_likely_as_the_likeliest(
    tiny_model_path: Path, device: str, dtype: str, tolerance: float
) -> None:
    loaded = load_model(
        open_checkpoint(tiny_model_path),
        dtype=dtype,
        kv_dtype="auto",
        device=device,
        page_size=16,
        max_context=128,
        token_budget=128,
        kv_memory=None,
    )
    sequences = [list(prompt) for prompt in PROMPTS]
    starts = [0] * len(PROMPTS)
    for _ in range(NEW_TOKENS):
        chunks = tuple(
            Chunk(
                request_id=str(i),
                tokens=tokens,
                num_prompt_tokens=len(PROMPTS[i]),
                start=starts[i],
                length=len(tokens) - starts[i],
                block_ids=range(i * PAGES_EACH, (i + 1) * PAGES_EACH),
                sampling=SamplingParams(),
            )
            for i, tokens in enumerate(sequences)
        )
        starts = [len(tokens) for tokens in sequences]
        for tokens, (sampled,) in zip(sequences, loaded.runner.step(StepPlan(chunks)).sampled, strict=True):
            tokens.append(sampled.token_id)

    oracle = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    for prompt, tokens in zip(PROMPTS, sequences, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(tokens[len(prompt) :])[:, None])[:, 0]
        assert behind.max() < tolerance
