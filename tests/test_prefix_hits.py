"""What the prefix cache finds gives the answers of a cold start, on a real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.loader import LoadedModel, load_model
from pagestream.model.step import SampledToken, SamplingParams
from pagestream.server.block_pool import BlockPool
from pagestream.server.request import Request
from pagestream.server.scheduler import Scheduler

PAGE_SIZE = 16
SAMPLINGS = (SamplingParams(logprobs=3), SamplingParams(temperature=1.0, seed=7, logprobs=3))


@pytest.fixture(scope="module")
def load(tiny_model_path: Path) -> Callable[..., LoadedModel]:
    def load(dtype: str, *, deterministic: bool = False) -> LoadedModel:
        return load_model(
            open_checkpoint(tiny_model_path),
            dtype=dtype,
            kv_dtype="auto",
            device="cpu",
            page_size=PAGE_SIZE,
            max_context=512,
            token_budget=64,
            kv_memory=8 << 20,
            deterministic=deterministic,
        )

    return load


def answers(
    model: LoadedModel, prompts: list[list[int]], *, prefix_cache: bool
) -> tuple[list[list[SampledToken]], int]:
    """All answers, one after the other, and how many prompt tokens were found."""
    pool = BlockPool(32, PAGE_SIZE, prefix_cache=prefix_cache)
    scheduler = Scheduler(pool, token_budget=64, max_running=4)
    found: list[list[SampledToken]] = []
    for number, prompt in enumerate(prompts):
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        scheduler.admit(Request(str(number), prompt, sampling, max_new_tokens=12))
        found.append([])
        while scheduler.has_work:
            plan = scheduler.plan()
            advances = scheduler.commit(plan, model.runner.step(plan))
            found[-1] += [token for advance in advances for token in advance.sampled]
    return found, scheduler.hit_tokens_total


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int4"])
def test_a_hit_answers_as_a_cold_start(load: Callable[..., LoadedModel], dtype: str) -> None:
    """Prompts that repeat, go on, or leave each other within a page. In bf16 and int4, tokens and logprobs are the
    same to the last bit; torch's own products in fp32 depend on how many rows are computed at once.
    """
    model = load(dtype)
    base = [(7 * number) % 300 for number in range(75)]
    prompts = [base, base, base + base[:30], base[:41] + [299] * 20, base[:64], base + base[:30] + [5]]
    cold, none = answers(model, prompts, prefix_cache=False)
    warm, hits = answers(model, prompts, prefix_cache=True)
    assert (none, hits) == (0, 74 + 75 + 41 + 63 + 105)
    if dtype != "fp32":
        assert warm == cold
    else:
        for ours, theirs in zip(warm, cold, strict=True):
            assert [token.token_id for token in ours] == [token.token_id for token in theirs]
            assert [token.logprob for token in ours] == pytest.approx([token.logprob for token in theirs], abs=1e-4)


def test_deterministic_answers_that_come_back_in_prompts_are_hits_like_others(load: Callable[..., LoadedModel]) -> None:
    """As in a chat. Otherwise, where prompts have an arithmetic of their own, they are close but not the same."""
    model = load("int4", deterministic=True)
    prompt = [(7 * number) % 300 for number in range(40)]
    (first,), _ = answers(model, [prompt], prefix_cache=False)
    chat = prompt + [token.token_id for token in first] + [5, 6, 7]
    cold, none = answers(model, [prompt, chat], prefix_cache=False)
    warm, hits = answers(model, [prompt, chat], prefix_cache=True)
    assert (none, hits) == (0, len(prompt) + len(first) - 1)
    assert warm == cold
