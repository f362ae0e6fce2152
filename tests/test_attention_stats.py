"""Statistics of real models through the whole server half: they change no token, add up, and show damage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.loader import LoadedModel, load_model
from pagestream.model.step import SampledToken, SamplingParams
from pagestream.server.events import Delta, Finished
from pagestream.server.metrics import Metrics
from pagestream.server.stats import RequestStats, Span, StatsDetail, StatsRequest
from tests.support.fakes import Rig, make_job

PROMPT = "The licence says what one may do with a program and what not. " * 3  # bytes are tokens of any model
SPANS = (Span("head", 0, 30), Span("body", 30, 150), Span("tail", 150, len(PROMPT)))
SAMPLINGS = (SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=3, logprobs=2))


def load(path: Path, dtype: str) -> LoadedModel:
    return load_model(
        open_checkpoint(path),
        dtype=dtype,
        kv_dtype="auto",
        device="cpu",
        page_size=16,
        max_context=512,
        token_budget=64,
        kv_memory=64 << 20,
    )


@pytest.fixture(scope="module", params=["tiny", "default"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    """Of random weights in fp32, and the default model."""
    if request.param == "tiny":
        return load(request.getfixturevalue("tiny_model_path"), "fp32")
    return load(request.getfixturevalue("default_model_path"), "int4")


@pytest.fixture
def make_rig(model: LoadedModel, make_metrics: Callable[..., Metrics]) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**settings: object) -> Rig:
        rigs.append(Rig(make_metrics(), runner=model.runner, num_blocks=128, **settings))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.engine.stop()


def submit(rig: Rig, request_id: str, sampling: SamplingParams, stats: StatsRequest, tokens: int = 24) -> None:
    job = make_job(request_id, prompt=PROMPT, max_new_tokens=tokens, received=time.monotonic(), stats=stats)
    job.request = replace(job.request, sampling=sampling, eos_token_ids=frozenset())
    rig.engine.inbox.submit(job)


def answer(rig: Rig, request_id: str) -> tuple[list[SampledToken], RequestStats | None]:
    end = rig.recorder.end_of(request_id)
    assert isinstance(end, Finished)
    events = rig.recorder.events[request_id]
    return [token for event in events if isinstance(event, Delta) for token in event.tokens], end.stats


@pytest.mark.parametrize("attention_every", [0, 1])
def test_asking_changes_no_token_and_no_logprob_bitwise(make_rig: Callable[..., Rig], attention_every: int) -> None:
    """Nobody asks, or everybody, in one batch and with prompts cut to chunks."""
    found = []
    for detail in (StatsDetail.OFF, StatsDetail.OUTPUT, StatsDetail.SPANS):
        rig = make_rig(attention_every=attention_every if detail else 0)
        stats = StatsRequest(detail, 1, SPANS if detail is StatsDetail.SPANS else ())
        rig.runner.hold()
        for number, sampling in enumerate(SAMPLINGS):
            submit(rig, str(number), sampling, stats)
        answers = [answer(rig, str(number))[0] for number in range(len(SAMPLINGS))]
        found.append([[replace(token, output=None) for token in tokens] for tokens in answers])
    assert found[0] == found[1] == found[2]
