"""What the model thinks of given answers: requests that the engine runs like any other, and their scores."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from pagestream.model.step import SampledToken, SamplingParams
from pagestream.model.text_stream import TextStream
from pagestream.server.engine import Engine
from pagestream.server.events import Delta, Failed
from pagestream.server.job import Job, end_together
from pagestream.server.prepare import check_fits
from pagestream.server.request import Priority, Request
from pagestream.server.served import ServedModel
from pagestream.server.streams import Mailbox, Streams

_SAMPLING = SamplingParams(logprobs=1)  # beside the token's own, that of the likeliest


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """Of one answer: for each of its tokens, log-probability at temperature 1, and whether none was likelier."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]


def scoring_jobs(
    prompts: Sequence[Sequence[int]],
    answer: Sequence[int],
    model: ServedModel,
    *,
    tenant: str,
    priority: Priority,
    received: float,
    deadline: float | None = None,
    internal: bool = False,
) -> list[Job]:
    """A job for `answer` after each of the prompts, one call together. All but the first wait for that one, so that
    they find in the cache what they begin with. Raises the refusals of what is too long.
    """
    call, jobs = uuid.uuid4().hex, list[Job]()
    for index, prompt in enumerate(prompts):
        read = [*prompt, *answer[:-1]]
        check_fits(len(read), model)
        request = Request(
            request_id=f"{call}#{index}",
            prompt=read,
            sampling=_SAMPLING,
            max_new_tokens=1,
            tenant=tenant,
            priority=priority,
            starts_after=jobs[0].request if jobs else None,
            given=list(answer),
        )
        jobs.append(Job(request, TextStream(model.tokenizer), received, deadline, index=index, internal=internal))
    end_together(jobs)
    return jobs


def submit(jobs: Sequence[Job], engine: Engine, streams: Streams) -> Mailbox:
    """Raises RequestError: nothing is held for what is refused. The scores must be awaited next."""
    engine.inbox.submit(*jobs)
    return streams.open(*jobs)  # no await since submit, so no event can have been missed


async def scores(jobs: Sequence[Job], mailbox: Mailbox, engine: Engine, streams: Streams) -> list[AnswerScore]:
    """Of each job of a call that was submitted. Raises RequestError. However it ends, also if it is cancelled, the
    engine lets go."""
    found: dict[int, AnswerScore] = {}
    try:
        async for event in mailbox:
            match event:
                case Delta():
                    found[event.index] = _score(event.tokens)
                case Failed():
                    raise event.error
    finally:
        streams.close(*jobs)
        engine.inbox.cancel(*jobs)  # a no-op unless something broke
    return [found[job.index] for job in jobs]


def _score(tokens: Sequence[SampledToken]) -> AnswerScore:
    logprobs = [(token.logprob or 0.0, token.top_logprobs[0][1]) for token in tokens]
    return AnswerScore(tuple(own for own, _ in logprobs), tuple(own >= best for own, best in logprobs))
