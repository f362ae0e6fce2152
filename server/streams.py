"""The bridge from the engine's thread to the event loop: one mailbox for each live call."""

from __future__ import annotations

import asyncio
import ctypes
import os
import weakref
from collections import deque
from collections.abc import AsyncIterator

from pagestream.server.errors import AbortedError
from pagestream.server.events import Delta, Event, Failed, Finished, Progress
from pagestream.server.job import Job, Publication


class Mailbox:
    """Events of all answers to one prompt on their way to the handler; used on the event loop only.

    Deltas of an answer that wait are merged when they are read and progress is overwritten, so a slow reader costs a
    few events and at most the tokens that backpressure.py lets wait.
    """

    def __init__(self, num_answers: int = 1) -> None:
        self._num_open = num_answers
        self._progress: Progress | None = None
        self._deltas: dict[int, list[Delta]] = {}  # by answer
        self._ends: list[Finished | Failed] = []
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        match event:
            case Progress():
                self._progress = event
            case Delta():
                self._deltas.setdefault(event.index, []).append(event)
            case Finished():
                self._ends.append(event)
                self._num_open -= 1
            case Failed():
                self._ends.append(event)
                self._num_open = 0
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yields until all answers are Finished or one has Failed, which is the last event."""
        while self._num_open or self._arrived.is_set():
            await self._arrived.wait()
            self._arrived.clear()
            progress, self._progress = self._progress, None
            deltas, self._deltas = self._deltas, {}
            ends, self._ends = self._ends, []
            if progress is not None:
                yield progress
            for waiting in deltas.values():
                yield merge(waiting) if len(waiting) > 1 else waiting[0]
            for end in ends:
                yield end


def merge(deltas: list[Delta]) -> Delta:
    """One for all, which are of one answer."""
    tokens = tuple(token for d in deltas for token in d.tokens)
    stats = tuple(token for d in deltas for token in d.stats)
    return Delta("".join(d.text for d in deltas), tokens, deltas[0].index, stats)


class Streams:
    """All mailboxes, by job: a request id may be in use again while the reader of its last answer is slow.

    `publish` may be called from any thread and costs the loop one wake-up for a whole step. It does not let go of the
    interpreter, as `call_soon_threadsafe` does: the loop would take it there and then, between two steps. So the loop
    delivers as soon as the engine lets go, which is while the kernels run.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._publications: deque[Publication] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ring = ctypes.PyDLL(None).eventfd_write  # os.eventfd_write lets go of the interpreter
        self._ring.argtypes = ctypes.c_int, ctypes.c_uint64
        weakref.finalize(self, os.close, self._bell)
        loop.call_soon_threadsafe(loop.add_reader, self._bell, self._deliver)
        self._mailboxes: dict[Job, Mailbox] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def open(self, *jobs: Job) -> Mailbox:
        """One mailbox for all answers to a prompt."""
        mailbox = Mailbox(len(jobs))
        self._mailboxes |= dict.fromkeys(jobs, mailbox)
        self._empty.clear()
        return mailbox

    def close(self, *jobs: Job) -> None:
        for job in jobs:
            self._mailboxes.pop(job, None)
        if not self._mailboxes:
            self._empty.set()

    @property
    def jobs(self) -> list[Job]:
        """Of all calls that are open."""
        return list(self._mailboxes)

    def abort(self, request_id: str, tenant: str) -> None:
        """Ends the call of a live request of this tenant as CANCELLED, which frees what it holds; or does nothing."""
        for job, mailbox in self._mailboxes.items():
            if (job.request.request_id, job.request.tenant) == (request_id, tenant):
                mailbox.put(Failed(AbortedError(f"request {request_id} was aborted")))

    async def all_closed(self) -> None:
        """Returns when no request has a mailbox."""
        await self._empty.wait()

    def publish(self, publication: Publication) -> None:
        self._publications.append(publication)
        self._ring(self._bell, 1)

    def _deliver(self) -> None:
        os.eventfd_read(self._bell)
        while self._publications:
            for job, event in self._publications.popleft():
                mailbox = self._mailboxes.get(job)
                if mailbox is not None:  # the client may have gone meanwhile
                    mailbox.put(event)
