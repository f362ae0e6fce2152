"""The gRPC services. They translate and wait; nothing here computes."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from typing import Any

import grpc

from pagestream.server import status, translate
from pagestream.server.call import current_call
from pagestream.server.errors import RequestError
from pagestream.server.events import Delta, Event, Failed, Finished, Progress
from pagestream.server.metrics import Metrics
from pagestream.server.prepare import prepare
from pagestream.server.served import ModelSlot
from pagestream.server.streams import Streams, merge
from pagestream.server.validate import GenerateMessage, num_answers
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceServicer

TENANT_KEY = "x-pagestream-tenant"  # call metadata: requests that say the same share as one

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationService(GenerationServiceServicer):
    """Prompts in, tokens out. Refusals are statuses; a stream that ends OK has ended with a Finished of each answer."""

    def __init__(self, slot: ModelSlot, streams: Streams, tokenizing: Executor, metrics: Metrics) -> None:
        self._slot = slot
        self._streams = streams
        self._tokenizing = tokenizing
        self._metrics = metrics

    async def GenerateStream(  # noqa: N802 - the proto's name
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        try:
            async for event in self.events(request, context):
                yield _response(event, request.output)
        except RequestError as error:
            await status.abort(context, error)

    async def Generate(  # noqa: N802 - the proto's name
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        deltas: dict[int, list[Delta]] = defaultdict(list)
        finished: dict[int, Finished] = {}
        response = pb.GenerateResponse()
        try:
            async for event in self.events(request, context):
                match event:
                    case pb.Accepted():
                        response.accepted.CopyFrom(event)
                    case Delta():
                        deltas[event.index].append(event)
                    case Finished():
                        finished[event.index] = event
        except RequestError as error:
            await status.abort(context, error)
        for index, end in sorted(finished.items()):
            whole = translate.delta(merge(deltas[index]), request.output)
            answer = response.others.add() if index else response
            answer.text = whole.text
            answer.token_ids.extend(whole.token_ids)
            answer.logprobs.extend(whole.logprobs)
            answer.finished.CopyFrom(translate.finished(end))
        return response

    async def events(self, request: GenerateMessage, context: Context) -> AsyncIterator[pb.Accepted | Event]:
        """Accepted, then what the engine says. Raises RequestError. However the call ends, the engine lets go."""
        received = time.monotonic()
        try:
            model = self._slot.get(request.model)
            engine = model.engine
            remaining = context.time_remaining()
            deadline = None if remaining is None else received + remaining
            tenant = tenant_of(context)
            # Before tokenising: a full or draining server must not spend time on the prompt.
            answers = num_answers(request)
            with engine.inbox.entering(tenant, max(1, len(request.token_ids.ids)), answers):
                jobs = await prepare(
                    request, answers, model, tenant, received, deadline, self._tokenizing, self._metrics
                )
                queue_position = engine.inbox.submit(*jobs)
            current_call().jobs = jobs
        except RequestError as error:
            self._metrics.observe_rejected(error.reason, time.monotonic() - received)
            raise
        mailbox = self._streams.open(*jobs)  # no await since submit, so no event can have been missed

        def let_go(_context: Context) -> None:
            self._streams.close(*jobs)
            engine.inbox.cancel(*jobs)  # a no-op unless the client has gone or this handler broke

        # Not a `finally`: gRPC drops a generator whose client has gone, and its end would come when it is collected.
        context.add_done_callback(let_go)  # type: ignore[arg-type]  # the stubs' callback has no such signature
        yield translate.accepted(jobs[0], queue_position)
        waiting_for_first = True
        async for event in mailbox:
            if isinstance(event, Failed):
                raise event.error
            yield event  # comes back when gRPC has taken it
            if isinstance(event, Delta):
                engine.inbox.acknowledge(jobs[event.index], len(event.tokens))
                if waiting_for_first:
                    waiting_for_first = False
                    self._metrics.observe_first_delta(jobs[0].request.num_prompt_tokens, time.monotonic() - received)


def tenant_of(context: Context) -> str:
    """A digest of the tenant of the caller's key or, where that has none, of what the client calls itself, which says
    nothing beyond its own key; the name itself is of no use and of no concern here.
    """
    key, said = current_call().key, dict(context.invocation_metadata() or ()).get(TENANT_KEY, "")
    if key.tenant is None and not key.name and not said:
        return ""
    name = ("tenant", key.tenant) if key.tenant is not None else ("client", key.name, str(said))
    return hashlib.blake2b(repr(name).encode(), digest_size=8).hexdigest()


def _response(event: pb.Accepted | Event, output: pb.OutputConfig) -> pb.GenerateStreamResponse:
    match event:
        case Delta():  # first: there is one for each token
            return pb.GenerateStreamResponse(delta=translate.delta(event, output))
        case Progress():
            return pb.GenerateStreamResponse(prefill_progress=translate.progress(event))
        case pb.Accepted():
            return pb.GenerateStreamResponse(accepted=event)
        case Finished():
            return pb.GenerateStreamResponse(finished=translate.finished(event))
        case Failed():
            raise event.error
