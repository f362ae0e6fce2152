"""Statistics of real models through the whole server half: they change no token, add up, and show damage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.loader import LoadedModel, load_model
from pagestream.model.step import (
    AttentionSummary,
    Chunk,
    SampledToken,
    SamplingParams,
    StatsLevel,
    StepPlan,
    StepResult,
)
from pagestream.server.events import Delta, Failed, Finished
from pagestream.server.integrity import MIN_REQUESTS, MIN_ROWS
from pagestream.server.job import Job
from pagestream.server.metrics import Metrics
from pagestream.server.scheduler import Scheduler
from pagestream.server.stats import RequestStats, Span, StatsDetail, StatsMeta, StatsRequest
from tests.support.fakes import FakeClock, Rig, make_job

PROMPT = "The licence says what one may do with a program and what not. " * 3  # bytes are tokens of any model
SPANS = (Span("head", 0, 30), Span("body", 30, 150), Span("tail", 150, len(PROMPT)))
SAMPLINGS = {"greedy": SamplingParams(), "drawn": SamplingParams(temperature=0.8, top_p=0.9, seed=3, logprobs=2)}

MakeRig = Callable[..., Rig]


def load(path: Path, dtype: str, kv_dtype: str = "auto") -> LoadedModel:
    return load_model(
        open_checkpoint(path),
        dtype=dtype,
        kv_dtype=kv_dtype,
        device="cpu",
        page_size=16,
        max_context=512,
        token_budget=64,
        kv_memory=64 << 20,
    )


@pytest.fixture(scope="module", params=["tiny", "default, bf16", "default, int8"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    """Of random weights in fp32, and the default model with each kind of cache."""
    if request.param == "tiny":
        return load(request.getfixturevalue("tiny_model_path"), "fp32")
    return load(request.getfixturevalue("default_model_path"), "int4", request.param.split()[1])


@pytest.fixture
def make_rig(model: LoadedModel, make_metrics: Callable[..., Metrics]) -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(**settings: object) -> Rig:
        settings = {"num_blocks": 128, "runner": model.runner, **settings}
        rigs.append(Rig(make_metrics(), **settings))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.engine.stop()


def jobs(requests: dict[str, SamplingParams], stats: StatsRequest, count: int = 24) -> list[Job]:
    made = []
    for request_id, sampling in requests.items():
        job = make_job(request_id, prompt=PROMPT, max_new_tokens=count, received=time.monotonic(), stats=stats)
        job.request = replace(job.request, sampling=sampling, eos_token_ids=frozenset())
        made.append(job)
    return made


def answer(rig: Rig, request_id: str) -> tuple[list[SampledToken], RequestStats]:
    end = rig.recorder.end_of(request_id)
    assert isinstance(end, Finished)
    deltas = [event for event in rig.recorder.events[request_id] if isinstance(event, Delta)]
    return [token for delta in deltas for token in delta.tokens], end.stats or RequestStats(StatsMeta(0, 0, 0))


def test_asking_changes_no_token_and_no_logprob_bitwise(make_rig: MakeRig) -> None:
    """Nobody asks, or everybody and the server too, in one batch and with prompts cut into chunks, by no real time: a
    row's bits in fp32 depend on how many there are."""
    found = []
    for every, detail in ((0, StatsDetail.OFF), (3, StatsDetail.OUTPUT), (2, StatsDetail.SPANS)):
        rig = make_rig(attention_every=every, clock=FakeClock())
        stats = StatsRequest(detail, 1, SPANS if detail is StatsDetail.SPANS else ())
        rig.engine.inbox.submit(*jobs(SAMPLINGS, stats))
        found.append([[replace(token, output=None) for token in answer(rig, name)[0]] for name in SAMPLINGS])
    assert found[0] == found[1] == found[2]
    assert all(token.logprob is not None for token in found[0][1])


def test_spans_of_a_whole_prompt_share_all_there_is(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.engine.inbox.submit(*jobs({"r": SamplingParams()}, StatsRequest(StatsDetail.SPANS, 1, SPANS), count=1))
    _, stats = answer(rig, "r")
    for name in ("mass", "mass_without_sink", "contribution_share"):
        assert sum(getattr(span, name) for span in stats.spans) == pytest.approx(1, abs=1e-3)
    assert sum(span.mass / span.lift for span in stats.spans) == pytest.approx(1, abs=1e-6)
    assert sum(stats.band_mass) == pytest.approx(1, abs=1e-4)
    for group in stats.attention:
        assert (
            0 <= group.entropy_head_min <= group.entropy_nats <= group.entropy_head_max <= math.log(len(PROMPT)) + 1e-4
        )
        assert group.sink_mass + group.recent_mass + group.middle_mass == pytest.approx(1, abs=1e-4)


def numbers(stats: RequestStats) -> list[float]:
    found = [value for group in stats.attention for value in astuple(group) if isinstance(value, float)]
    found += [value for span in stats.spans for value in astuple(span) if isinstance(value, float)]
    assert stats.structure is not None
    return [*found, *stats.band_mass, stats.pages_for_95 or 0, *(value or 0 for value in astuple(stats.structure))]


class Preempting:
    """Sends the youngest request back to the queue while some steps are in flight, so that these are in vain."""

    def __init__(self, model: LoadedModel) -> None:
        self._model, self._num_steps = model, 0
        self.scheduler: Scheduler | None = None

    def step(self, plan: StepPlan) -> StepResult:
        self._num_steps += 1
        if self.scheduler is not None and self._num_steps in (7, 12, 13, 20):
            self.scheduler._preempt_youngest()
        return self._model.runner.step(plan)


def test_statistics_do_not_depend_on_cache_batch_or_preemption(model: LoadedModel, make_rig: MakeRig) -> None:
    """Cold and alone; after a hit in the prefix cache; among others; with preemptions."""
    asked, greedy = StatsRequest(StatsDetail.SPANS, 2, SPANS), SamplingParams()
    rig = make_rig()
    rig.engine.inbox.submit(*jobs({"cold": greedy}, asked))
    alone = answer(rig, "cold")
    rig.engine.inbox.submit(*jobs({"warm": greedy}, asked))
    found = [answer(rig, "warm")]
    assert rig.scheduler.hit_tokens_total > 0
    rig.engine.inbox.submit(*jobs({"one": greedy, "other": SAMPLINGS["drawn"], "another": greedy}, asked))
    found += [answer(rig, "one"), answer(rig, "another")]
    runner = Preempting(model)
    rig = make_rig(runner=runner)
    runner.scheduler = rig.scheduler
    rig.engine.inbox.submit(*jobs(dict.fromkeys("ab", greedy), asked))
    found += [answer(rig, "a"), answer(rig, "b")]
    assert rig.scheduler.num_preemptions_total > 1
    for tokens, stats in found:
        assert [token.token_id for token in tokens] == [token.token_id for token in alone[0]]
        assert numbers(stats) == pytest.approx(numbers(alone[1]), rel=1e-3, abs=1e-3)


def test_accepted_guesses_are_observed_as_tokens_that_came_alone(make_rig: MakeRig) -> None:
    """Attention is of the rows that began a step, output statistics of every token."""
    repetitive = SamplingParams(logit_bias=dict.fromkeys(range(40, 43), 30.0))  # guesses are often right
    asked, found = StatsRequest(StatsDetail.SPANS, 1, SPANS), []
    for speculation in (False, True):
        rig = make_rig(speculation=speculation)
        rig.engine.inbox.submit(*jobs({"r": repetitive}, asked, count=40))
        tokens, stats = answer(rig, "r")
        deltas = [event for event in rig.recorder.events["r"] if isinstance(event, Delta)]
        found.append(([token.token_id for token in tokens], [each for delta in deltas for each in delta.stats], stats))
    (tokens, one_by_one, alone), (same_tokens, several, guessed) = found
    assert same_tokens == tokens
    assert [each.context_tokens for each in several] == [each.context_tokens for each in one_by_one]
    observed = [each.attention is not None for each in several]
    assert sum(observed) == guessed.meta.rows_observed < alone.meta.rows_observed == guessed.meta.rows_total == 40
    for ours, theirs in zip(several, one_by_one, strict=True):
        assert ours.output is not None
        assert theirs.output is not None
        assert astuple(ours.output) == pytest.approx(astuple(theirs.output), abs=1e-3)
        if ours.attention is not None:
            assert theirs.attention is not None
            assert astuple(ours.attention) == pytest.approx(astuple(theirs.attention), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("length", [63, 64, 65, 128])
def test_proposed_tokens_do_not_show_in_the_row_before_them(model: LoadedModel, length: int) -> None:
    """Around the ends of the tiles in which the kernel works."""
    known, pages = list(PROMPT.encode())[:length], range(20)
    model.runner.step(StepPlan((Chunk("r", known, length - 1, 0, length - 1, pages, SamplingParams()),)))

    def observe(*proposed: int) -> AttentionSummary:
        chunk = Chunk("r", known, length - 1, length - 1, 1 + len(proposed), pages, SamplingParams())
        chunk = replace(chunk, proposed=proposed, attention=StatsLevel.PAGES, spans=((0, 9), (9, length)))
        (row,) = model.runner.step(StepPlan((chunk,))).attention
        assert row is not None
        return row

    alone, followed = observe(), observe(5, 6, 7, 8, 9)
    for before, after in zip(alone.groups, followed.groups, strict=True):
        assert astuple(after) == pytest.approx(astuple(before), abs=1e-3)
    assert np.array(followed.bands) == pytest.approx(np.array(alone.bands), abs=1e-3)
    assert alone.pages is not None
    assert followed.pages is not None
    assert followed.pages.mass == pytest.approx(alone.pages.mass, abs=1e-3)
    assert np.array([astuple(span) for span in followed.pages.spans]) == pytest.approx(
        np.array([astuple(span) for span in alone.pages.spans]), abs=1e-3
    )


class Damaged:
    """The default model, whose keys a test can spoil between two steps."""

    def __init__(self, model: LoadedModel) -> None:
        self._runner, cache = model.runner, model.runner._cache
        self._keys = cache.rows[:, :, :, 0]  # [L, P, Hkv, B, D]
        self._sizes = self._keys if cache.scales is None else cache.scales[:, :, :, 0]
        self.spoil: Callable[[Sequence[int]], None] | None = None  # given the first request's pages

    def step(self, plan: StepPlan) -> StepResult:
        if self.spoil is not None and plan.chunks[0].is_decode:
            self.spoil(plan.chunks[0].block_ids)
            self.spoil = None
        return self._runner.step(plan)

    def fill(self, page: int, value: float) -> None:
        self._sizes[:, page] = value

    def make_up(self, page: int) -> None:
        keys = self._keys[:, page]
        keys.copy_((torch.randn(keys.shape) * keys.float().std()).clamp(-127, 127))


def texts(model_path: Path, count: int) -> list[list[int]]:
    """Prompts of 130 tokens of ordinary prose."""
    tokenizer = open_checkpoint(model_path).load_tokenizer()
    tokens = tokenizer.encode((Path(__file__).parents[2] / "LICENSE").read_text(), add_special_tokens=False)
    return [tokens[130 * number : 130 * (number + 1)] for number in range(count)]


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_a_spoilt_page_trips_the_monitor(
    default_model_path: Path, make_metrics: Callable[..., Metrics], kv_dtype: str
) -> None:
    """Keys emptied or made up between two steps; nothing trips it before."""
    runner = Damaged(load(default_model_path, "int4", kv_dtype))
    rig = Rig(make_metrics(), runner=runner, num_blocks=128, attention_every=1)  # type: ignore[arg-type]
    *usual, emptied, made_up, no_number = texts(default_model_path, MIN_REQUESTS + 3)

    def ask(request_id: str, prompt: list[int], count: int) -> Finished | Failed:
        job = make_job(request_id, max_new_tokens=count, received=time.monotonic())
        job.request = replace(job.request, prompt=prompt, eos_token_ids=frozenset())
        rig.engine.inbox.submit(job)
        return rig.recorder.end_of(request_id)

    def events() -> dict[str, float]:
        return {kind: count for (kind,), count in rig.metrics.read().values["integrity_events_total"].items() if count}

    try:
        for number, prompt in enumerate(usual):
            assert isinstance(ask(str(number), prompt, 2 + MIN_ROWS // MIN_REQUESTS), Finished)
        assert events() == {}
        runner.spoil = lambda pages: runner.fill(pages[0], 0)
        assert isinstance(ask("emptied", emptied, 5), Finished), "an event is no failure"
        after_emptied = events()
        assert after_emptied["sink_lost"] > 0
        runner.spoil = lambda pages: runner.make_up(pages[2])
        assert isinstance(ask("made up", made_up, 5), Finished)
        assert events()["sink_lost"] > after_emptied["sink_lost"]
        assert "nan" not in events()
        runner.spoil = lambda pages: runner.fill(pages[0], math.nan)
        assert isinstance(ask("no number", no_number, 5), Failed)
        assert events()["nan"] == 1
    finally:
        rig.engine.stop()
