"""Given answers: read like prompts, scored token by token, whatever happens on the way."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.sampling import NonFiniteLogitsError
from pagestream.model.step import MAX_SCORED_ROWS, SamplingParams
from pagestream.server import admission
from pagestream.server import given as given_module
from pagestream.server.request import FinishReason, Request
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import insight_pb2, stats_pb2
from tests.support.client import refused
from tests.support.scheduling import VOCABULARY, Simulation, make_request
from tests.support.service import KV_CAPACITY, MAX_CONTEXT, Service
from tests.support.waiting import WAIT, wait_until

MakeService = Callable[..., Service]


def to_score(name: str, tokens: list[int], answer: int) -> Request:
    """A request to score the last `answer` of the tokens."""
    return Request(name, tokens[:-1], SamplingParams(), 1, given=tokens[-answer:])


def test_each_given_token_is_scored_once_after_all_before_it() -> None:
    """Chunked, batched with answers that grow, preempted, with prefix hits, and with room for few scores a step."""
    events: Counter[str] = Counter()
    lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=5)

    @given(lengths, st.integers(6, 40), st.integers(1, 12), st.booleans(), st.integers(0, 2**32))
    @settings(max_examples=100, deadline=None, derandomize=True)
    def law(sizes: list[tuple[int, int]], budget: int, rows: int, prefix_cache: bool, seed: int) -> None:
        simulation = Simulation(13, 4, budget, 6, prefix_cache=prefix_cache)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(given_module, "MAX_SCORED_ROWS", rows)
            patch.setattr(admission, "GROWTH", 1)
            for number, (prompt, answer) in enumerate(sizes):
                tokens = [zlib.crc32(f"{seed} {i // 9 * (number + 1)} {i}".encode()) % VOCABULARY for i in range(50)]
                simulation.admit(to_score(str(number), tokens[: prompt + answer], answer))
                simulation.admit(make_request(100 + number, tokens[:prompt], 12, ends=False))
                simulation.step()
            simulation.run_to_the_end()
        assert simulation.pool.num_active == 0
        events.update(simulation.events)
        for request in simulation.requests:
            if request.given:
                check_scores(request)
            else:
                assert request.num_output_tokens == 12

    law()
    assert all(events[kind] > 10 for kind in ("preempted", "copied", "scored")), events


def check_scores(request: Request) -> None:
    assert (request.finish_reason, request.num_output_tokens) == (FinishReason.SCORED, 0)
    whole = [*request.prompt, request.given[-1]]
    first = len(whole) - len(request.given)
    expected = [zlib.crc32(bytes(whole[:place])) % VOCABULARY for place in range(first, len(whole))]
    assert [token.token_id for token in request.scores] == expected


def test_a_step_scores_no_more_rows_than_there_is_memory_for() -> None:
    simulation = Simulation(200, 4, 512, 8)
    requests = [to_score(str(n), [n] * 150, 100) for n in range(2)]
    for request in requests:
        simulation.admit(request)
    scored = []
    while simulation.scheduler.has_work:
        before = sum(len(request.scores) for request in requests)
        simulation.step()
        scored.append(sum(len(request.scores) for request in requests) - before)
    assert sum(scored) == 200
    assert max(scored) == MAX_SCORED_ROWS
    assert min(scored[1:-1]) == MAX_SCORED_ROWS, "and no fewer while there are more"


def score(service: Service, prompt: bytes, answer: bytes, timeout: float = WAIT) -> insight_pb2.ScoreResponse:
    request = insight_pb2.ScoreRequest(token_ids=pb.TokenIds(ids=prompt), answer_token_ids=answer)
    return service.client.insight.Score(request, timeout=timeout)


def spans(**ranges: tuple[int, int]) -> list[stats_pb2.Span]:
    return [stats_pb2.Span(name=name, begin_token=begin, end_token=end) for name, (begin, end) in ranges.items()]


def ablate(
    service: Service, prompt: bytes, answer: bytes, spans: list[stats_pb2.Span]
) -> insight_pb2.AblateSpansResponse:
    request = insight_pb2.AblateSpansRequest(token_ids=pb.TokenIds(ids=prompt), answer_token_ids=answer, spans=spans)
    return service.client.insight.AblateSpans(request, timeout=WAIT)


def end_reasons(service: Service) -> dict[str, float]:
    counts = service.metrics.read().values["requests_finished_total"]
    return {reason: count for (reason,), count in counts.items() if count}


def test_a_score_per_token_and_nothing_generated(service: Service) -> None:
    response = score(service, b"ab", b"bbc")  # the model expects each token again
    assert (list(response.logprobs), list(response.greedy)) == ([0, 0, -1], [True, True, False])
    assert response.usage == pb.Usage(prompt_tokens=5)
    assert score(service, b"ab", b"bbc").usage.cached_tokens == 1  # behind the last of the prompt, it scores
    wait_until(service.is_idle, "everything is free")
    assert end_reasons(service) == {"scored": 2}
    reading = service.metrics.read()
    assert reading.values["output_tokens_total"][()] == 0
    assert reading.histograms["inter_token_latency_seconds"].counts.sum() == 0


def test_text_and_chat_are_read_as_in_generation(service: Service) -> None:
    by_text = insight_pb2.ScoreRequest(text="ab", answer_token_ids=b"b")
    assert service.client.insight.Score(by_text, timeout=WAIT).usage.prompt_tokens == 3
    chat = insight_pb2.ScoreRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]), answer_token_ids=b">"
    )
    response = service.client.insight.Score(chat, timeout=WAIT)
    assert (response.usage.prompt_tokens, list(response.greedy)) == (len("[user]hi>") + 1, [True])


def test_an_answer_may_fill_the_context_and_not_more(service: Service) -> None:
    assert len(score(service, b"a" * (KV_CAPACITY - 70), b"a" * 70).logprobs) == 70
    with refused("INVALID_ARGUMENT", "PROMPT_EXCEEDS_KV_CAPACITY"):
        score(service, b"a" * (KV_CAPACITY - 70), b"a" * 71)
    with refused("INVALID_ARGUMENT", "PROMPT_EXCEEDS_MODEL_CONTEXT"):
        score(service, b"a", b"a" * MAX_CONTEXT)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD"):
        score(service, b"a", b"")
    with refused("INVALID_ARGUMENT", "INVALID_FIELD"):
        score(service, b"", b"a")


def test_the_change_without_each_span(service: Service) -> None:
    prompt = b"x" * 40 + b"yz"
    response = ablate(service, prompt, b"zz", spans(far=(3, 23), near=(41, 42)))
    assert response.logprob == 0
    far, near = response.spans
    assert (far.name, far.tokens, far.logprob, far.logprob_change, list(far.token_changes)) == ("far", 20, 0, 0, [0, 0])
    assert (near.name, near.tokens, near.logprob, list(near.token_changes)) == ("near", 1, -1, [-1, 0])
    assert "do not add up" in response.caveat
    # The whole prompt was read first; the others found what they begin with, less what they score.
    assert response.usage == pb.Usage(prompt_tokens=44 + 24 + 43, cached_tokens=20 + 40)
    wait_until(service.is_idle, "everything is free")
    assert end_reasons(service) == {"scored": 3}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ([], "spans"),
        (spans(**{f"s{n}": (0, 1) for n in range(65)}), "spans"),
        (spans(whole=(0, 5)), "spans[0]"),
        (spans(a=(0, 1), late=(3, 6)), "spans[1].end_token"),
        (spans(empty=(2, 2)), "spans[0].end_token"),
        (spans(a=(0, 1)) * 2, "spans[1].name"),
        (spans(**{"x" * 65: (0, 1)}), "spans[0].name"),
        (spans(**{"": (0, 1)}), "spans[0].name"),
    ],
)
def test_bad_spans_are_refused(service: Service, asked: list[stats_pb2.Span], field: str) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD") as refusal:
        ablate(service, b"abcde", b"f", asked)
    assert refusal.got.fields == [field]
    assert service.rig.engine.inbox.num_live == 0


def test_a_deadline_a_cancel_and_a_fault_free_everything(service: Service) -> None:
    request = insight_pb2.AblateSpansRequest(
        token_ids=pb.TokenIds(ids=b"abc" * 90), answer_token_ids=b"abc", spans=spans(a=(0, 9), b=(9, 99), c=(60, 70))
    )
    service.rig.runner.hold()
    with refused("DEADLINE_EXCEEDED", None):
        service.client.insight.AblateSpans(request, timeout=1)
    wait_until(service.rig.engine.inbox._has_mail, "the server has seen it")
    call = service.client.insight.AblateSpans.future(request, timeout=WAIT)
    wait_until(lambda: service.rig.engine.inbox.num_live == 8, "the next has arrived")
    call.cancel()
    wait_until(lambda: len(service.rig.engine.inbox._cancels) == 8, "and left")
    service.rig.runner.allow()
    wait_until(lambda: sum(end_reasons(service).values()) == 8, "all have ended")
    wait_until(service.is_idle, "everything is free")
    service.rig.runner.on_step = fail_the_second
    with refused("INTERNAL", "ENGINE_FAULT"):
        service.client.insight.AblateSpans(request, timeout=WAIT)
    wait_until(service.is_idle, "everything is free")
    assert end_reasons(service).items() >= {"error": 3, "scored": 1}.items()


def fail_the_second(plan: object) -> None:
    for chunk in plan.chunks:  # type: ignore[attr-defined]
        if chunk.request_id.endswith("#2"):
            raise NonFiniteLogitsError(chunk.request_id)
