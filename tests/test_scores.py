"""Scores of given answers: transformers' own, and what generation reports, to the bit where rows are independent."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.loader import LoadedModel, load_model
from pagestream.model.step import SampledToken, SamplingParams
from pagestream.server import admission
from pagestream.server.block_pool import BlockPool
from pagestream.server.request import Request
from pagestream.server.scheduler import Scheduler

PAGE_SIZE, VOCABULARY = 16, 300
LENGTHS = ((1, 1), (40, 100), (200, 30), (17, 1), (90, 70))  # prompt, answer


def load(path: Path, dtype: str) -> LoadedModel:
    return load_model(
        open_checkpoint(path),
        dtype=dtype,
        kv_dtype="auto",
        device="cpu",
        page_size=PAGE_SIZE,
        max_context=1024,
        token_budget=512,
        kv_memory=16 * 2**20,
    )


def run(loaded: LoadedModel, requests: Sequence[Request], num_blocks: int, budget: int) -> Scheduler:
    pool = BlockPool(num_blocks, PAGE_SIZE)
    scheduler = Scheduler(pool, token_budget=budget, max_running=8)
    for request in requests:
        scheduler.admit(request)
    while scheduler.has_work:
        plan = scheduler.plan()
        scheduler.commit(plan, loaded.runner.step(plan))
    return scheduler


def to_score(name: str, prompt: list[int], answer: list[int]) -> Request:
    return Request(name, prompt + answer[:-1], SamplingParams(logprobs=1), 1, given=answer)


def random_texts() -> list[tuple[list[int], list[int]]]:
    """Prompts and answers, some of which begin alike."""
    chance = random.Random(0)
    common = [chance.randrange(VOCABULARY) for _ in range(400)]
    tails = [[chance.randrange(VOCABULARY) for _ in range(length)] for _, length in LENGTHS]
    return [(common[:length], tail) for (length, _), tail in zip(LENGTHS, tails, strict=True)]


def test_scores_are_those_of_transformers(tiny_model_path: Path) -> None:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
    texts = random_texts()
    requests = [to_score(str(i), prompt, answer) for i, (prompt, answer) in enumerate(texts)]
    run(load(tiny_model_path, "fp32"), requests, num_blocks=60, budget=100)
    for request, (prompt, answer) in zip(requests, texts, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(answer)), answer].tolist()
        assert [score.logprob for score in request.scores] == pytest.approx(expected, abs=1e-4)
        assert [score.top_logprobs[0][0] for score in request.scores] == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("dtype", "tolerance"), [("int4", 0.0), ("fp32", 1e-4)])
def test_scores_are_those_that_generation_reports(
    tiny_model_path: Path, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked, beside others, with prefix hits and after preemption."""
    loaded = load(tiny_model_path, dtype)
    texts = random_texts()
    generated: list[tuple[list[int], list[float | None]]] = []
    for prompt, answer in texts:
        request = Request("alone", prompt, SamplingParams(temperature=1.5, seed=7, logprobs=0), len(answer))
        tokens = generate(loaded, request)
        generated.append(([token.token_id for token in tokens], [token.logprob for token in tokens]))
    monkeypatch.setattr(admission, "GROWTH", 1)
    requests = [to_score(str(i), prompt, generated[i][0]) for i, (prompt, _) in enumerate(texts)]
    others = [Request(f"beside {i}", prompt, SamplingParams(), 90) for i, (prompt, _) in enumerate(texts)]
    scheduler = run(loaded, [*others, *requests], num_blocks=36, budget=61)
    assert scheduler.num_preemptions_total > 0
    assert scheduler.hit_tokens_total > 0
    for request, (_, expected) in zip(requests, generated, strict=True):
        got = [score.logprob for score in request.scores]
        assert got == pytest.approx(expected, abs=tolerance, rel=0)
        assert all(value is not None and math.isfinite(value) and value < 0 for value in got)


def generate(loaded: LoadedModel, request: Request) -> list[SampledToken]:
    scheduler = Scheduler(BlockPool(60, PAGE_SIZE), token_budget=512, max_running=8)
    scheduler.admit(request)
    tokens: list[SampledToken] = []
    while scheduler.has_work:
        plan = scheduler.plan()
        tokens += [t for advance in scheduler.commit(plan, loaded.runner.step(plan)) for t in advance.sampled]
    return tokens
