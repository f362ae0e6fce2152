"""Observing attention changes no bit, is the same however a row is computed, and is refused where it makes no sense."""

from __future__ import annotations

import pytest
import torch

from pagestream.kernels import build
from pagestream.kernels.summary import Observation
from pagestream.model.attention import build_observation
from pagestream.model.batch import build_batch
from pagestream.model.network import Network
from pagestream.model.runner import Runner
from pagestream.model.step import Chunk, SamplingParams, StatsLevel, StepPlan
from tests.model.observed_runs import PAGE_SIZE, SPANS, WINDOWED, make_cache, make_weights, read, texts
from tests.model.test_native import BASE
from tests.model.test_network_matches_transformers import CPU


def batch_of(streams: list[tuple[list[int], int, list[int]]], **options: object) -> StepPlan:
    """Of each stream, (tokens, start, blocks), what is left to compute."""
    samplings = (SamplingParams(logprobs=2), SamplingParams(temperature=1.0, seed=3, logprobs=2))
    chunks = (
        Chunk(str(i), tokens, len(tokens), start, len(tokens) - start, blocks, samplings[i % 2], **options)  # type: ignore[arg-type]
        for i, (tokens, start, blocks) in enumerate(streams)
    )
    return StepPlan(tuple(chunks))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_asking_changes_no_bit(dtype: torch.dtype, *, native: bool) -> None:
    """Of tokens, logprobs and caches, in a batch of decodes and a prompt chunk, at every level."""
    weights = make_weights(WINDOWED, native=native)
    tokens = texts(WINDOWED, 300, 40, 130)
    blocks = [list(range(20)), list(range(20, 30)), list(range(30, 40))]
    results, storages = [], []
    for options in (
        {},
        {"attention": StatsLevel.HEADS},
        {"attention": StatsLevel.PAGES, "spans": SPANS, "output_stats": True},
    ):
        cache = make_cache(WINDOWED, dtype)
        runner = Runner(WINDOWED, weights, cache)
        runner.step(batch_of([(t[:-1], 0, b) for t, b in zip(tokens[:2], blocks, strict=False)], **options))
        starts = (299, 39, 0)
        result = runner.step(batch_of(list(zip(tokens, starts, blocks, strict=True)), **options))
        results.append([[(t.token_id, t.logprob, t.top_logprobs) for t in chunk] for chunk in result.sampled])
        storages.append(cache.storage)
    assert results[0] == results[1] == results[2]
    assert all(torch.equal(storages[0], storage) for storage in storages[1:])


def test_do_not_depend_on_batch_chunks_prefix_hits_pages_or_threads() -> None:
    """To the last bit, where the kernels do the work."""
    if build.load().implementation != "cpp":
        pytest.skip(build.load().detail)
    weights, (tokens, other, third) = make_weights(WINDOWED, native=True), texts(WINDOWED, 300, 90, 40)
    options = {"attention": StatsLevel.PAGES, "spans": SPANS}

    def fresh() -> Runner:
        return Runner(WINDOWED, weights, make_cache(WINDOWED, torch.bfloat16))

    (alone,) = read(fresh(), tokens, [], list(range(19)), **options).attention
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        (chunked,) = read(fresh(), tokens, [7, 250], list(range(40, 59)), **options).attention
    finally:
        torch.set_num_threads(before)
    sharing = fresh()
    read(sharing, [*tokens[:160], 5, 6], [], list(range(11)))  # its first ten pages are found again
    blocks = [*range(10), *range(20, 29)]
    hit = sharing.step(
        batch_of([(tokens, 160, blocks), (other, 0, list(range(30, 36))), (third, 0, [40, 41, 42])], **options)
    )
    assert alone is not None
    assert alone.pages is not None
    assert alone == chunked == hit.attention[0]


def test_nothing_is_said_where_nothing_is_asked() -> None:
    native, dense = (Runner(BASE, make_weights(BASE, native=n), make_cache(BASE)) for n in (True, False))
    for runner in (native, dense):
        assert read(runner, [1, 2, 3], [], [0]).attention == ()
    assert read(dense, [1, 2, 3], [], [0]).seconds is None
    if build.load().implementation == "cpp":
        first, second = (read(native, [1, 2, 3], [], [0]).seconds for _ in range(2))
        assert first is not None
        assert second is not None
        assert all(0 < seconds < 10 for seconds in (*first, *second))


@pytest.mark.parametrize("span", [(-1, 2), (2, 2), (0, 4)])
def test_spans_outside_the_context_are_refused_by_name(span: tuple[int, int]) -> None:
    runner = Runner(BASE, make_weights(BASE, native=True), make_cache(BASE))
    with pytest.raises(ValueError, match="r: span"):
        read(runner, [1, 2, 3], [], [0], attention=StatsLevel.PAGES, spans=(span,))


def test_wrong_observations_are_refused_by_name_before_anything_is_written() -> None:
    if build.load().implementation != "cpp":
        pytest.skip(build.load().detail)
    cache = make_cache(BASE)
    network = Network(BASE, make_weights(BASE, native=True))
    plan = batch_of([([1, 2, 3], 0, [0]), ([4, 5], 0, [1])], attention=StatsLevel.PAGES, spans=((0, 2),))
    batch = build_batch(plan, PAGE_SIZE, CPU)
    observation = build_observation(plan, BASE, 1)
    assert observation is not None

    def with_row(index: int, *row: int) -> Observation:
        rows = observation.rows.clone()
        rows[index] = torch.tensor(row)
        return observation._replace(rows=rows)

    wrong = [
        (with_row(0, 3, 0, 0), "sequence 0"),
        (with_row(1, 4, 2, 1), "sequence 2"),
        (with_row(1, 2, 0, 1), "increase"),
        (with_row(1, 4, 1, 2), "pages 2"),
        (observation._replace(spans=observation.spans.flip(0)), "order"),
        (observation._replace(spans=torch.tensor([[0, 0, 2], [1, 0, 3]], dtype=torch.int32)), "spans"),
        (observation._replace(means=observation.means[:1]), "means"),
        (observation._replace(means=observation.means.double()), "means"),
        (observation._replace(page_masses=observation.page_masses[..., :1]), "page_masses"),
        (observation._replace(span_shares=observation.span_shares[:1]), "span_shares"),
    ]
    for changed, name in wrong:
        with pytest.raises(ValueError, match=name):
            network.outputs(batch, cache, changed)
    assert cache.rows.isnan().all()
