"""Which requests met their objectives, and that no first token is missed however often requests are preempted."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import grpc
import pytest

from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.loader import LoadedModel, load_model
from pagestream.model.step import StepPlan, StepResult
from pagestream.server import admission
from pagestream.server.events import Timings, nearest_rank
from pagestream.server.metric_families import CTX, Outcome, ctx_of
from pagestream.server.metrics import Metrics
from pagestream.server.objectives import Objectives
from pagestream.server.request import FinishReason
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub
from tests.server.test_metrics import make_request
from tests.support.fakes import EchoRunner
from tests.support.service import Service, stop
from tests.support.waiting import WAIT, wait_until

OBJECTIVES = Objectives(first_token=1.0, gap=0.1, end=10.0)


def timings(first: float | None, *gaps: float) -> Timings:
    return Timings(queue=None, prefill=None, decode=None, time_to_first_token=first, gaps=gaps)


@pytest.mark.parametrize(
    ("reason", "times", "seconds", "judged"),
    [
        (FinishReason.MAX_TOKENS, timings(1.0, 0.1, 0.05), 10.0, {"ttft": True, "itl": True, "e2e": True}),
        (FinishReason.STOP_STRING, timings(1.1, 0.1, 0.2), 10.1, {"ttft": False, "itl": False, "e2e": False}),
        (FinishReason.END_OF_SEQUENCE, timings(0.5), 1.0, {"ttft": True, "e2e": True}),
        (FinishReason.MAX_TOKENS, timings(0.1, *[0.01] * 300, 0.5), 5.0, {"ttft": True, "itl": True, "e2e": True}),
        (FinishReason.DEADLINE, timings(0.5, 0.01), 2.0, {"ttft": True, "itl": True, "e2e": False}),
        (FinishReason.QUEUE_TIMEOUT, timings(None), 2.0, {"ttft": False, "e2e": False}),
        (FinishReason.CANCELLED, timings(5.0), 20.0, {}),
        (FinishReason.SCORED, timings(None), 20.0, {}),
    ],
)
def test_what_is_met(reason: FinishReason, times: Timings, seconds: float, judged: dict[str, bool]) -> None:
    assert dict(OBJECTIVES.judge(reason, times, seconds)) == judged


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(1, 0.5, 1), (2, 0.5, 1), (5, 0.5, 3), (1, 0.99, 1), (99, 0.99, 99), (100, 0.99, 99), (101, 0.99, 100)],
)
def test_quantiles_are_of_the_nearest_rank(count: int, share: float, expected: int) -> None:
    """Worked out by hand: of 1, 2, 3 ... the smallest that this share does not exceed."""
    assert nearest_rank(range(1, count + 1), share) == expected


def test_requests_are_counted_by_their_prompt() -> None:
    metrics = Metrics(objectives=OBJECTIVES)
    for length, first in ((100, 0.5), (5000, 3.0)):
        metrics.observe_finished(FinishReason.MAX_TOKENS, make_request(length), timings(first), 4.0)
    counts = {labels: n for labels, n in metrics.read().values["slo_requests_total"].items() if n}
    assert counts == {
        ("256", "ttft", "true"): 1,
        ("256", "e2e", "true"): 1,
        ("8192", "ttft", "false"): 1,
        ("8192", "e2e", "true"): 1,
    }


class RealRunner(EchoRunner):
    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self._runner = model.runner

    def step(self, plan: StepPlan) -> StepResult:
        return self._runner.step(plan)


@dataclass
class Seen:
    """What a client knows of its stream."""

    prompt: int
    first: float | None = None  # seconds from sending to the first token
    tokens: int = 0
    preemptions: int = 0


async def watch(stub: GenerationServiceStub, number: int) -> Seen:
    seen = Seen(270 if number % 10 == 5 else 10 + number % 30)
    request = pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=[(number + 7 * place) % 250 for place in range(seen.prompt)]),
        stop=stop(20 + number % 30, ignore_eos=True),
        output=pb.OutputConfig(token_ids=True),
        queue_timeout={"nanos": 1_000_000} if number % 10 == 0 else None,
    )
    sent = time.monotonic()
    try:
        async for event in stub.GenerateStream(request, timeout=WAIT):
            seen.tokens += len(event.delta.token_ids)
            if seen.tokens and seen.first is None:
                seen.first = time.monotonic() - sent
            seen.preemptions = event.finished.usage.preemptions
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or seen.tokens:
            raise
    return seen


def test_histograms_count_what_500_clients_saw_while_hundreds_lose_their_places(
    make_service: Callable[..., Service], tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, to a real model with a pool for few; answers begin without room, so they take it from each other.
    One in ten leaves the queue at once."""
    monkeypatch.setattr(admission, "GROWTH", 0)
    monkeypatch.setattr(admission, "MAX_RECOMPUTED", 1.0)
    checkpoint = open_checkpoint(tiny_model_path)
    model = load_model(
        checkpoint,
        dtype="fp32",
        kv_dtype="auto",
        device="cpu",
        page_size=16,
        max_context=512,
        token_budget=64,
        kv_memory=4 << 20,
    )
    service = make_service(
        tokenizer=checkpoint.load_tokenizer(), runner=RealRunner(model), num_blocks=32, max_running=16
    )

    async def all_of_them() -> list[Seen]:
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub = GenerationServiceStub(channel)
            return await asyncio.gather(*(watch(stub, number) for number in range(500)))

    seen = asyncio.run(all_of_them())
    answered = [each for each in seen if each.first is not None]
    assert len(answered) >= 400
    wait_until(service.is_idle, "all is counted")
    reading = service.metrics.read()
    preemptions = reading.values["preemptions_total"]["out_of_blocks",]
    assert preemptions == sum(each.preemptions for each in answered) > 100
    by_ctx = Counter(ctx_of(each.prompt) for each in answered)
    for family in ("time_to_first_token_seconds", "queue_time_seconds", "prefill_time_seconds"):
        assert reading.histograms[family].counts[:, -1].tolist() == [by_ctx[ctx] for ctx in CTX], family
    firsts = reading.histograms["time_to_first_token_seconds"].sums
    for row, ctx in enumerate(CTX):
        assert firsts[row] <= sum(each.first or 0.0 for each in answered if ctx_of(each.prompt) == ctx)
    gaps = reading.histograms["inter_token_latency_seconds"].counts[:, -1]
    assert gaps.sum() == sum(each.tokens for each in answered) - len(answered)
    ended = dict(zip(get_args(Outcome), reading.histograms["request_duration_seconds"].counts[:, -1], strict=True))
    assert {outcome: n for outcome, n in ended.items() if n} == {"ok": len(answered), "rejected": 500 - len(answered)}
    met = reading.values["slo_requests_total"]
    judged = sum(n for (_, objective, _), n in met.items() if objective == "ttft")
    assert judged == 500 - reading.values["requests_rejected_total"]["queue_full",]
