"""Statistics over a real port: what each level brings, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import stats_pb2
from tests.support.client import refused
from tests.support.service import Service, stop
from tests.support.summaries import PAGE, ObservedRunner
from tests.support.waiting import WAIT

PROMPT = "abcdefghij" * 3
LEVELS = range(stats_pb2.STATS_LEVEL_UNSPECIFIED, stats_pb2.STATS_LEVEL_SPANS + 1)


@pytest.fixture
def observed(make_service: Callable[..., Service]) -> Service:
    return make_service(runner=ObservedRunner())


def options(**fields: Any) -> stats_pb2.StatsOptions:
    return stats_pb2.StatsOptions(**fields)


def span(name: str, begin: int, end: int) -> stats_pb2.Span:
    return stats_pb2.Span(name=name, begin_token=begin, end_token=end)


@pytest.mark.parametrize("level", LEVELS, ids=stats_pb2.StatsLevel.Name)
def test_each_level_brings_what_the_lower_ones_do_and_more(observed: Service, level: stats_pb2.StatsLevel) -> None:
    spans = [span("all", 0, 30), span("end", 20, 30)] if level == stats_pb2.STATS_LEVEL_SPANS else []
    answer = observed.client.stream(text=PROMPT, stop=stop(40), stats=options(level=level, spans=spans))
    tokens = [token for delta in answer.deltas for token in delta.stats]
    assert answer.finished.HasField("stats") == bool(tokens) == (level >= stats_pb2.STATS_LEVEL_TIMING)
    assert {token.HasField("output") for token in tokens} <= {level >= stats_pb2.STATS_LEVEL_OUTPUT}
    if not tokens:
        return
    assert [token.context_tokens for token in tokens] == list(range(30, 70))
    assert [token.HasField("gap") for token in tokens] == [False] + [True] * 39
    stats = answer.finished.stats
    assert stats.HasField("mean_surprisal_nats") == (level >= stats_pb2.STATS_LEVEL_OUTPUT)
    has_attention, has_spans = level >= stats_pb2.STATS_LEVEL_ATTENTION, level >= stats_pb2.STATS_LEVEL_SPANS
    every = 32 if has_spans else 1
    assert [token.HasField("attention") for token in tokens] == [has_attention and i % every == 0 for i in range(40)]
    assert [group.group for group in stats.attention] == (["early", "middle", "late"] if has_attention else [])
    assert len(stats.band_mass) == (16 if has_attention else 0)
    assert stats.HasField("structure") == stats.HasField("pages_for_95") == has_spans
    assert [(s.name, s.tokens) for s in stats.spans] == ([("all", 30), ("end", 10)] if has_spans else [])
    meta = stats.meta
    assert (meta.definition_version, meta.sink_tokens, meta.recent_tokens, meta.page_tokens) == (1, 4, 64, PAGE)
    assert (meta.rows_observed, meta.rows_total) == ((2 if has_spans else 40) if has_attention else 0, 40)
    assert "not an explanation" in meta.caveat


def test_values_arrive_as_the_runner_reported_them(observed: Service) -> None:
    asked = options(level=stats_pb2.STATS_LEVEL_SPANS, attention_every=3, spans=[span("q", 5, 20)])
    whole = observed.client.generate(text=PROMPT, stop=stop(9), stats=asked)
    stats = whole.finished.stats
    assert stats.meta.rows_observed == 3
    assert stats.mean_output_entropy_nats == pytest.approx(sum(ord(c) / 100 for c in "abcdefghi") / 9)
    [found] = stats.spans
    assert (found.mass, found.mass_without_sink, found.contribution_share, found.max_head_mass) == pytest.approx(
        (0.2, 0.3, 0.1, 0.7)
    )
    assert found.lift == pytest.approx(0.2 / 0.5)
    assert stats.structure.coherence_heads == pytest.approx(0.8)
    assert stats.attention[0].sink_mass == pytest.approx(0.5)


def test_several_answers_are_told_of_apart(observed: Service) -> None:
    asked = options(level=stats_pb2.STATS_LEVEL_ATTENTION, attention_every=2)
    call = observed.client.open(text=PROMPT, stop=stop(6), n=3, stats=asked)
    events = list(call)
    for index in range(3):
        tokens = [t for e in events if e.HasField("delta") and e.delta.index == index for t in e.delta.stats]
        assert [token.HasField("attention") for token in tokens] == [True, False] * 3
    ends = [event.finished for event in events if event.HasField("finished")]
    assert [end.stats.meta.rows_observed for end in ends] == [3, 3, 3]


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        ({"level": 6}, "stats.level"),
        ({"level": 4, "attention_every": 0}, "stats.attention_every"),
        ({"level": 4, "attention_every": 4097}, "stats.attention_every"),
        ({"level": 4, "spans": [span("a", 0, 1)]}, "stats.spans"),
        ({"spans": [span("a", 0, 1)]}, "stats.spans"),
        ({"level": 5, "spans": [span(str(n), 0, 1) for n in range(65)]}, "stats.spans"),
        ({"level": 5, "spans": [span("", 0, 1)]}, "stats.spans[0].name"),
        ({"level": 5, "spans": [span("é" * 65, 0, 1)]}, "stats.spans[0].name"),
        ({"level": 5, "spans": [span("a", 0, 1), span("b", 0, 1), span("a", 1, 2)]}, "stats.spans[2].name"),
        ({"level": 5, "spans": [span("a", 3, 3)]}, "stats.spans[0].end_token"),
        ({"level": 5, "spans": [span("a", 0, 30), span("b", 0, 31)]}, "stats.spans[1].end_token"),
        ({"level": 5, "spans": [span("a", 2**32 - 1, 0)]}, "stats.spans[0].end_token"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_name_of_its_field(
    service: Service, fields: dict[str, Any], bad: str
) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD") as refusal:
        service.client.stream(text=PROMPT, stats=options(**fields))
    assert refusal.got.fields == [bad]


def test_the_ends_of_the_ranges_are_allowed(service: Service) -> None:
    spans = [span("é" * 64, 0, 1), *(span(str(n), 29, 30) for n in range(62)), span("all", 0, 30)]
    for fields in ({"level": 5, "attention_every": 4096, "spans": spans}, {"level": 4, "attention_every": 1}):
        service.client.generation.Generate(
            pb.GenerateRequest(text=PROMPT, stop=stop(1), stats=options(**fields)), timeout=WAIT
        )


def test_a_runner_that_observes_nothing_is_reported_as_such(service: Service) -> None:
    stats = service.client.stream(text="ab", stop=stop(3), stats=options(level=5)).finished.stats
    assert (stats.meta.rows_observed, stats.meta.rows_total, len(stats.attention)) == (0, 3, 0)
