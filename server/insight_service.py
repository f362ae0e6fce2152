"""The gRPC service that says what a prompt would cost, how likely an answer is, and what it rested on."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from typing import Any

import grpc

from pagestream.server import scoring, status, translate, validate
from pagestream.server.call import current_call
from pagestream.server.errors import RequestError
from pagestream.server.job import Job
from pagestream.server.metrics import Metrics
from pagestream.server.prepare import check_fits, read_prompt
from pagestream.server.scoring import AnswerScore
from pagestream.server.served import ModelSlot
from pagestream.server.service import tenant_of
from pagestream.server.streams import Streams
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import insight_pb2
from pagestream.v1.insight_pb2_grpc import InsightServiceServicer

CAVEAT = (
    "Causal for this prompt and this answer alone: the change when the span is left out and what follows it moves up. "
    "Effects of spans do not add up: two that say the same each seem to matter little."
)

Ablation = insight_pb2.AblateSpansRequest
Context = grpc.aio.ServicerContext[Any, Any]


class InsightService(InsightServiceServicer):
    """Answers from requests that the engine runs beside all others. Refusals are statuses."""

    def __init__(self, slot: ModelSlot, streams: Streams, tokenizing: Executor, metrics: Metrics) -> None:
        self._slot = slot
        self._streams = streams
        self._tokenizing = tokenizing
        self._metrics = metrics

    async def Estimate(  # noqa: N802 - the proto's name
        self, request: insight_pb2.EstimateRequest, context: Context
    ) -> insight_pb2.EstimateResponse:
        received = time.monotonic()
        try:
            model = self._slot.get(request.model)
            tenant = tenant_of(context)
            # what a generation would be told
            with model.engine.inbox.entering(tenant, max(1, len(request.token_ids.ids))):
                validate.check_prompt(request, model.vocab_size)
                prompt = await read_prompt(request, model, self._tokenizing, self._metrics)
                check_fits(len(prompt), model)
            answer = model.engine.estimate(prompt, tenant)
        except RequestError as error:
            self._metrics.observe_rejected(error.reason, time.monotonic() - received)
            await status.abort(context, error)
        return translate.estimate(await asyncio.wrap_future(answer))

    async def Score(  # noqa: N802 - the proto's name
        self, request: insight_pb2.ScoreRequest, context: Context
    ) -> insight_pb2.ScoreResponse:
        try:
            jobs, (score,) = await self._score(request, context)
        except RequestError as error:
            await status.abort(context, error)
        return insight_pb2.ScoreResponse(logprobs=score.logprobs, greedy=score.greedy, usage=_usage(jobs))

    async def AblateSpans(  # noqa: N802 - the proto's name
        self, request: insight_pb2.AblateSpansRequest, context: Context
    ) -> insight_pb2.AblateSpansResponse:
        try:
            jobs, (whole, *without) = await self._score(request, context)
        except RequestError as error:
            await status.abort(context, error)
        effects = []
        for span, score in zip(request.spans, without, strict=True):
            changes = [after - before for after, before in zip(score.logprobs, whole.logprobs, strict=True)]
            effects.append(
                insight_pb2.SpanEffect(
                    name=span.name,
                    tokens=span.end_token - span.begin_token,
                    logprob=sum(score.logprobs),
                    logprob_change=sum(changes),
                    token_changes=changes,
                )
            )
        return insight_pb2.AblateSpansResponse(
            logprob=sum(whole.logprobs), spans=effects, usage=_usage(jobs), caveat=CAVEAT
        )

    async def _score(self, request: validate.ScoreMessage, context: Context) -> tuple[list[Job], list[AnswerScore]]:
        """Of the answer after the prompt, and after what is left of it without each of the spans. Raises RequestError,
        and counts it if it came before the engine had the request."""
        received = time.monotonic()
        try:
            model = self._slot.get(request.model)
            remaining = context.time_remaining()
            spans = validate.spans("spans", request.spans) if isinstance(request, Ablation) else ()
            tenant = tenant_of(context)
            with model.engine.inbox.entering(tenant, max(1, len(request.answer_token_ids)), 1 + len(spans)):
                validate.check_prompt(request, model.vocab_size)
                validate.check_answer(request, model.vocab_size)
                priority = validate.priority(request)
                prompt = await read_prompt(request, model, self._tokenizing, self._metrics)
                if isinstance(request, Ablation):
                    validate.check_ablated(spans, len(prompt))
                jobs = scoring.scoring_jobs(
                    [prompt, *(prompt[: span.begin] + prompt[span.end :] for span in spans)],
                    request.answer_token_ids,
                    model,
                    tenant=tenant,
                    priority=priority,
                    received=received,
                    deadline=None if remaining is None else received + remaining,
                )
                mailbox = scoring.submit(jobs, model.engine, self._streams)
                current_call().jobs = jobs
        except RequestError as error:
            self._metrics.observe_rejected(error.reason, time.monotonic() - received)
            raise
        return jobs, await scoring.scores(jobs, mailbox, model.engine, self._streams)


def _usage(jobs: list[Job]) -> pb.Usage:
    """Of requests that have ended. Each answer's last token counts too, though it need not be computed."""
    requests = [job.request for job in jobs]
    return pb.Usage(
        prompt_tokens=sum(request.num_prompt_tokens + 1 for request in requests),
        cached_tokens=sum(request.num_cached or 0 for request in requests),
        preemptions=sum(request.num_preemptions for request in requests),
    )
