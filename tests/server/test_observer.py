"""What the server observes by itself, what requests get of what they ask for, and that neither sees the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pagestream.model.sampling import NonFiniteLogitsError
from pagestream.model.step import StatsLevel
from pagestream.server.events import Delta, Finished
from pagestream.server.metrics import Metrics
from pagestream.server.stats import RequestStats, Span, StatsDetail, StatsRequest, TokenStats
from tests.support.fakes import Rig
from tests.support.summaries import ObservedRunner, make_row
from tests.support.waiting import wait_until

MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig(make_metrics: Callable[..., Metrics]) -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(**settings: object) -> Rig:
        rigs.append(Rig(make_metrics(), runner=ObservedRunner(), **settings))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def observed(rig: Rig, request_id: str) -> list[tuple[int, StatsLevel, int]]:
    """Context, level and number of spans of each row of a request that the runner was asked for."""
    assert isinstance(rig.runner, ObservedRunner)
    rows = [(chunk, row) for chunk, row in rig.runner.rows if chunk.request_id == request_id]
    return [(row.context, chunk.attention, len(chunk.spans)) for chunk, row in rows]


def told(rig: Rig, request_id: str) -> tuple[list[TokenStats], RequestStats]:
    end = rig.recorder.end_of(request_id)
    assert isinstance(end, Finished)
    assert end.stats is not None
    tokens = [token for event in rig.recorder.events[request_id] if isinstance(event, Delta) for token in event.stats]
    assert len(tokens) == end.output_tokens == end.stats.meta.rows_total
    return tokens, end.stats


def total(rig: Rig, name: str) -> float:
    wait_until(lambda: rig.metrics.snapshot.active_blocks == 0, "the engine is idle")
    return sum(rig.metrics.read().values[name].values())


def test_the_server_looks_at_every_so_many_decodes_and_at_pages_in_one_of_sixteen(make_rig: MakeRig) -> None:
    rig = make_rig(attention_every=3)
    rig.submit("r", prompt="abcde", max_new_tokens=100)
    rig.recorder.end_of("r")
    contexts = list(range(6, 105, 3))  # the first token decoded comes from the row of the sixth
    assert observed(rig, "r") == [
        (n, StatsLevel.HEADS if i % 16 else StatsLevel.PAGES, 0) for i, n in enumerate(contexts)
    ]
    assert total(rig, "attention_rows_total") == 3 * len(contexts)
    assert total(rig, "attention_sampled_rows_total") == 3
    outputs = rig.metrics.read().histograms["output_entropy_nats"]
    assert outputs.counts[0, -1] == len(contexts)
    assert outputs.sums[0] == pytest.approx(sum(ord("abcde"[n % 5]) / 100 for n in contexts))


def test_a_request_gets_what_it_asks_for_whatever_the_server_samples(make_rig: MakeRig) -> None:
    found = []
    for every in (0, 5):
        rig = make_rig(attention_every=every)
        rig.submit("other", prompt="xyz", max_new_tokens=30)
        asked = StatsRequest(StatsDetail.SPANS, 4, (Span("a", 0, 2), Span("b", 2, 3)))
        rig.submit("r", prompt="abc", max_new_tokens=30, stats=asked)
        tokens, stats = told(rig, "r")
        assert [i for i, token in enumerate(tokens) if token.attention is not None] == list(range(0, 30, 4))
        assert all(token.output is not None for token in tokens)
        assert [token.context_tokens for token in tokens] == list(range(3, 33))
        assert stats.meta.rows_observed == 8
        found.append((stats, [token.attention for token in tokens]))
        assert [row for row in observed(rig, "r") if row[2]] == [(n, StatsLevel.PAGES, 2) for n in range(3, 33, 4)]
        assert bool(observed(rig, "other")) == (every > 0)
        assert bool(total(rig, "attention_rows_total")) == (every > 0), "who asks weighs no more than others"
    assert found[0] == found[1]


def test_a_preempted_answer_tells_of_every_token_once(make_rig: MakeRig) -> None:
    rig = make_rig(num_blocks=24, block_size=1, token_budget=16)
    rig.runner.hold()
    for request_id, prompt in (("a", "abc"), ("b", "defgh"), ("c", "ij")):
        rig.submit(request_id, prompt=prompt, max_new_tokens=16, stats=StatsRequest(StatsDetail.ATTENTION))
    rig.runner.allow()
    for request_id in "abc":
        tokens, stats = told(rig, request_id)
        assert all(token.attention is not None for token in tokens)
        assert stats.meta.rows_observed == 16
    assert total(rig, "preemptions_total") > 0


def test_of_proposed_tokens_only_kept_ones_count(make_rig: MakeRig) -> None:
    rig = make_rig(attention_every=1, speculation=True)
    rig.submit(
        "r", prompt="abcdef" * 4, max_new_tokens=60, stop_strings=("ab cd",), stats=StatsRequest(StatsDetail.ATTENTION)
    )
    tokens, stats = told(rig, "r")
    assert rig.metrics.read().values["speculated_tokens_total"]["accepted",] > 10
    assert rig.metrics.read().histograms["output_entropy_nats"].counts[0, -1] == 59, "all but the first are decoded"
    assert stats.meta.rows_observed == sum(token.attention is not None for token in tokens) < 60
    assert total(rig, "attention_rows_total") == 3 * (stats.meta.rows_observed - 1)


def test_each_of_several_answers_has_statistics_of_its_own(make_rig: MakeRig) -> None:
    rig = make_rig()
    asked = StatsRequest(StatsDetail.TIMING)
    for request_id in ("a", "b"):
        rig.submit(request_id, prompt="ab", max_new_tokens=4 if request_id == "a" else 7, stats=asked)
    for request_id, count in (("a", 4), ("b", 7)):
        tokens, _ = told(rig, request_id)
        end = rig.recorder.end_of(request_id)
        assert isinstance(end, Finished)
        assert [token.gap for token in tokens] == [None, *end.timings.gaps]
        assert len(tokens) == count
        assert all(token.output is None and token.attention is None for token in tokens)


def test_a_damaged_row_is_an_event_and_no_failure(make_rig: MakeRig) -> None:
    rig = make_rig(attention_every=1)
    rig.runner.damage = lambda row: make_row(row.context, sink=float("nan"))  # type: ignore[attr-defined]
    rig.submit("r", prompt="ab", max_new_tokens=5)
    assert isinstance(rig.recorder.end_of("r"), Finished)
    assert rig.metrics.read().values["integrity_events_total"]["nan",] == 4


def test_logits_that_are_not_finite_are_an_event(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.runner.faults["r"] = NonFiniteLogitsError("r")
    rig.submit("r")
    rig.recorder.end_of("r")
    assert rig.metrics.read().values["integrity_events_total"]["nan",] == 1
