"""Speculation changes how long an answer takes, never its tokens: on a real quantised model, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.loader import LoadedModel, load_model
from pagestream.model.step import SampledToken, SamplingParams
from pagestream.server.block_pool import BlockPool
from pagestream.server.request import Request
from pagestream.server.scheduler import Scheduler

REPETITIVE = dict.fromkeys(range(40, 43), 8.0)  # an answer of few words is guessed now and then, whatever the network
SAMPLINGS = (
    SamplingParams(logprobs=3),
    SamplingParams(temperature=0.3, seed=7, logprobs=2),
    SamplingParams(temperature=0.05, top_p=0.9, repetition_penalty=1.05, frequency_penalty=0.01, seed=3, logprobs=2),
    SamplingParams(temperature=1.5, top_k=3, presence_penalty=0.2, seed=5, logprobs=1),
    SamplingParams(logprobs=3, logit_bias=REPETITIVE),  # last: of few rows to spare, the last ones have some
)


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> LoadedModel:
    return load_model(
        open_checkpoint(tiny_model_path),
        dtype="int4",
        kv_dtype="auto",
        device="cpu",
        page_size=16,
        max_context=512,
        token_budget=64,
        kv_memory=8 << 20,
    )


def answers(model: LoadedModel, *, speculation: bool, together: bool) -> tuple[list[list[SampledToken]], int]:
    """All answers, and how many decodes of one request it took."""
    scheduler = Scheduler(BlockPool(64, 16), token_budget=64, max_running=5, speculation=speculation)
    prompt = [(7 * number) % 13 + 40 for number in range(60)]
    requests = [Request(str(n), prompt, sampling, 80) for n, sampling in enumerate(SAMPLINGS)]
    found: dict[Request, list[SampledToken]] = {request: [] for request in requests}
    num_decodes = 0
    for request in requests:
        scheduler.admit(request)
        while scheduler.has_work and (not together or request is requests[-1]):
            plan = scheduler.plan()
            num_decodes += sum(chunk.is_decode for chunk in plan.chunks)
            for advance in scheduler.commit(plan, model.runner.step(plan)):
                found[advance.request] += advance.sampled
            scheduler.check_integrity()
    return list(found.values()), num_decodes


@pytest.mark.parametrize("together", [False, True])
def test_answers_are_those_without_speculation(model: LoadedModel, together: bool) -> None:
    assert model.is_row_invariant
    expected, without = answers(model, speculation=False, together=together)
    found, with_it = answers(model, speculation=True, together=together)
    assert found == expected
    assert with_it < without, "some proposals were right"
