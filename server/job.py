"""A live request with all that the scheduler must not know: its text, its clock times, what its client wants to see.

Each of several answers to one prompt is a job with a request of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pagestream.model.step import SampledToken
from pagestream.model.text_stream import TextStream
from pagestream.server.errors import RequestError, Usage
from pagestream.server.events import Delta, Event, Failed, Finished, Progress, Timings
from pagestream.server.ledger import Account
from pagestream.server.request import FinishReason, Request
from pagestream.server.request_stats import StatsRecord
from pagestream.server.stats import RequestStats, StatsDetail, StatsRequest, TokenStats

_ENDING_TOKEN = (FinishReason.END_OF_SEQUENCE, FinishReason.STOP_TOKEN)


@dataclass(slots=True, eq=False)
class Job:
    """Used by the engine's thread alone once it is submitted. All times are seconds on the engine's clock."""

    request: Request
    text: TextStream
    received: float
    deadline: float | None = None
    queue_deadline: float | None = None  # passes only while no step has worked on it
    progress_interval: float = 0.25
    index: int = 0  # of the answer
    internal: bool = False  # the server's own: it gives way to clients', and the metrics do not take it for one
    stats: StatsRequest = field(default_factory=StatsRequest)

    others: Sequence[Job] = field(default=(), init=False, repr=False)  # answers to the same prompt; all fail together
    first_scheduled: float | None = field(default=None, init=False)
    first_token: float | None = field(default=None, init=False)
    last_token: float | None = field(default=None, init=False)
    gaps: list[float] = field(default_factory=list, init=False)
    matched_stop: str | None = field(default=None, init=False)
    predicted_first_token: float | None = field(default=None, init=False)  # seconds from receipt, when it came in
    ledger: Account = field(default_factory=Account, init=False)
    unread: int = field(default=0, init=False)  # tokens that gRPC has not taken yet
    record: StatsRecord | None = field(default=None, init=False)  # None if it asked for no statistics
    _next_progress: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.stats.detail > StatsDetail.OFF:
            self.record = StatsRecord(self.stats)

    @property
    def is_finished(self) -> bool:
        return self.request.is_finished or self.matched_stop is not None

    @property
    def finish_reason(self) -> FinishReason | None:
        """A stop string wins over whatever else ended the request at the same token."""
        return FinishReason.STOP_STRING if self.matched_stop is not None else self.request.finish_reason

    def progress(self, now: float) -> Progress | None:
        """What to say of the prompt after a step that sampled nothing; None if it is too soon to say it again, or for
        the first answer to say."""
        if self.index or now < self._next_progress:
            return None
        self._next_progress = now + self.progress_interval
        total = self.request.num_prompt_tokens
        return Progress(min(self.request.num_computed, total), total)

    def take_tokens(self, tokens: tuple[SampledToken, ...], now: float) -> Delta:
        """Books the tokens of a step and turns them into text, up to a stop string; the request forgets those behind
        it. The token that ends an answer has no text of its own.
        """
        text = ""
        with_text = len(tokens) - (self.request.finish_reason in _ENDING_TOKEN)
        for count, token in enumerate(tokens[:with_text], start=1):
            piece = self.text.push(token.token_id)
            text += piece.text
            if piece.matched_stop is not None:
                self.matched_stop = piece.matched_stop
                self.request.drop_last(len(tokens) - count)
                tokens = tokens[:count]
                break
        if self.request.is_finished and self.matched_stop is None:
            text += self.text.finish()
        self._book_times(len(tokens), now)
        return Delta(text, tokens, self.index, self._token_stats(tokens))

    def _token_stats(self, tokens: tuple[SampledToken, ...]) -> tuple[TokenStats, ...]:
        """Of tokens just booked."""
        if self.record is None:
            return ()
        gaps = [None, *self.gaps[-len(tokens) :]][-len(tokens) :]
        return self.record.take(tokens, self.request.num_tokens - len(tokens), gaps, self.ledger)

    def _book_times(self, count: int, now: float) -> None:
        """Tokens of one step come at once: without a gap between them."""
        if self.first_token is None:
            self.first_token = now
        if self.last_token is not None:
            self.gaps.append(now - self.last_token)
        self.gaps += [0.0] * (count - 1)
        self.last_token = now

    def finished(self) -> Finished:
        reason = self.finish_reason
        assert reason is not None  # noqa: S101 - the engine asks only when is_finished
        return Finished(
            reason=reason,
            prompt_tokens=0 if self.index else self.request.num_prompt_tokens,  # counted once
            cached_tokens=0 if self.index else self.request.num_cached or 0,
            output_tokens=self.request.num_output_tokens,
            preemptions=self.request.num_preemptions,
            timings=self.timings(),
            matched_stop=self.matched_stop,
            matched_stop_token_id=self.request.tokens[-1] if reason is FinishReason.STOP_TOKEN else None,
            index=self.index,
            stats=self._request_stats(),
        )

    def _request_stats(self) -> RequestStats | None:
        if self.record is None:
            return None
        ledger = self.ledger
        return replace(
            self.record.read(),
            stall_suffered=ledger.suffered,
            stall_caused=ledger.caused,
            prefill_chunks=ledger.prefill_chunks,
        )

    def failed(self, error: RequestError) -> Failed:
        """The end of a request that was taken on, with all its answers; `error` belongs to it alone."""
        requests = [job.request for job in (self, *self.others)]
        error.usage = Usage(
            prompt_tokens=self.request.num_prompt_tokens,
            output_tokens=sum(request.num_output_tokens for request in requests),
            preemptions=sum(request.num_preemptions for request in requests),
        )
        return Failed(error)

    def timings(self) -> Timings:
        return Timings(
            queue=_between(self.received, self.first_scheduled),
            prefill=_between(self.first_scheduled, self.first_token),
            decode=_between(self.first_token, self.last_token),
            time_to_first_token=_between(self.received, self.first_token),
            gaps=tuple(self.gaps),
            predicted_time_to_first_token=self.predicted_first_token,
        )


def with_others(first: Job, texts: Sequence[TextStream]) -> list[Job]:
    """`first`, and a job for one more answer to its prompt in each of `texts`, drawn with the seeds that follow. These
    have no queue deadline: it passes only while no step has worked on the call, so on the first."""
    request, jobs = first.request, [first]
    for index, text in enumerate(texts, start=1):
        other = replace(
            request,
            request_id=f"{request.request_id}#{index}",
            sampling=replace(request.sampling, seed=(request.sampling.seed + index) % 2**64),
            starts_after=request,
        )
        jobs.append(replace(first, request=other, text=text, queue_deadline=None, index=index))
    end_together(jobs)
    return jobs


def end_together(jobs: Sequence[Job]) -> None:
    """Makes one call of them: if one fails, all do."""
    for job in jobs:
        job.others = [other for other in jobs if other is not job]


Publication = list[tuple[Job, Event]]  # in order: everything one step has to say


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
