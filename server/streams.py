"""The bridge from the engine's thread to the event loop: one mailbox for each live request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from pagestream.server.events import Delta, Event, Failed, Finished, Progress
from pagestream.server.job import Job, Publication


class Mailbox:
    """Events of one request on their way to its handler; used on the event loop only.

    Deltas that wait are merged when they are read and progress is overwritten, so a slow reader costs a few events
    and at most the tokens that backpressure.py lets wait.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._deltas: list[Delta] = []
        self._end: Finished | Failed | None = None
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        match event:
            case Progress():
                self._progress = event
            case Delta():
                self._deltas.append(event)
            case _:
                self._end = event
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yields until the end of the request; the last event is Finished or Failed."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            progress, self._progress = self._progress, None
            deltas, self._deltas = self._deltas, []
            if progress is not None:
                yield progress
            if deltas:
                yield merge(deltas)
            if self._end is not None and not self._deltas:
                yield self._end
                return


def merge(deltas: list[Delta]) -> Delta:
    return Delta("".join(d.text for d in deltas), tuple(token for d in deltas for token in d.tokens))


class Streams:
    """All mailboxes, by job: a request id may be in use again while the reader of its last answer is slow.

    `publish` may be called from any thread and costs the loop one wake-up for a whole step.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._mailboxes: dict[Job, Mailbox] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def open(self, job: Job) -> Mailbox:
        mailbox = Mailbox()
        self._mailboxes[job] = mailbox
        self._empty.clear()
        return mailbox

    def close(self, job: Job) -> None:
        self._mailboxes.pop(job, None)
        if not self._mailboxes:
            self._empty.set()

    async def all_closed(self) -> None:
        """Returns when no request has a mailbox."""
        await self._empty.wait()

    def publish(self, publication: Publication) -> None:
        self._loop.call_soon_threadsafe(self._deliver, publication)

    def _deliver(self, publication: Publication) -> None:
        for job, event in publication:
            mailbox = self._mailboxes.get(job)
            if mailbox is not None:  # the client may have gone meanwhile
                mailbox.put(event)
