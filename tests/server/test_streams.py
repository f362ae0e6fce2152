"""Mailboxes between the engine's thread and the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from pagestream.model.step import SampledToken
from pagestream.server import translate
from pagestream.server.backpressure import ReaderLimits
from pagestream.server.errors import EngineFaultError
from pagestream.server.events import Delta, Event, Failed, Finished, Progress, Timings
from pagestream.server.job import Publication
from pagestream.server.request import FinishReason
from pagestream.server.streams import Mailbox, Streams, merge
from pagestream.server.validate import MAX_LOGPROBS
from pagestream.v1 import generation_pb2 as pb
from tests.support.fakes import make_job
from tests.support.waiting import WAIT

T = TypeVar("T")
END = Finished(FinishReason.MAX_TOKENS, 3, 0, 2, 0, Timings(None, None, None, None))


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, WAIT))


def delta(text: str) -> Delta:
    return Delta(text, tuple(SampledToken(ord(character)) for character in text))


async def read(mailbox: Mailbox) -> list[Event]:
    return [event async for event in mailbox]


def test_what_waits_together_is_read_together() -> None:
    """A slow reader gets the latest progress, one delta, and the end."""

    async def scenario() -> list[Event]:
        mailbox = Mailbox()
        for event in (Progress(1, 9), Progress(5, 9), delta("a"), delta("bc"), END):
            mailbox.put(event)
        return await read(mailbox)

    assert run(scenario()) == [Progress(5, 9), delta("abc"), END]


def test_the_largest_delta_a_reader_can_be_owed_is_far_below_what_clients_take() -> None:
    """All that may be unread at once, each token with every log-probability and with 1,000 bytes of text, more than
    any vocabulary's; gRPC's clients take 4 MiB by default.
    """
    top = tuple((2**32 - 1, -1.0) for _ in range(MAX_LOGPROBS))
    token = SampledToken(2**32 - 1, logprob=-1.0, top_logprobs=top)
    largest = merge([Delta("x" * 1000, (token,))] * ReaderLimits().max_unread_tokens)
    assert translate.delta(largest, pb.OutputConfig(token_ids=True)).ByteSize() < 2**22 / 8


def test_a_failure_comes_after_what_was_made_before_it() -> None:
    failed = Failed(EngineFaultError("x"))

    async def scenario() -> list[Event]:
        mailbox = Mailbox()
        for event in (delta("a"), failed):
            mailbox.put(event)
        return await read(mailbox)

    assert run(scenario()) == [delta("a"), failed]


def test_what_arrives_while_an_event_is_handled_is_not_lost() -> None:
    """The end may overtake nothing: a reader that is busy with one delta still gets the next before the end."""

    async def scenario() -> list[Event]:
        mailbox, seen = Mailbox(), []
        mailbox.put(delta("a"))
        async for event in mailbox:
            seen.append(event)
            if event == delta("a"):
                mailbox.put(delta("b"))
                mailbox.put(END)
        return seen

    assert run(scenario()) == [delta("a"), delta("b"), END]


def test_a_publication_of_another_thread_reaches_each_open_mailbox() -> None:
    async def scenario() -> list[list[Event]]:
        streams = Streams(asyncio.get_running_loop())
        a, b, gone = (make_job("same id") for _ in range(3))
        mailboxes = [streams.open(a), streams.open(b)]
        publications: list[Publication] = [[(a, delta("1")), (b, delta("2")), (gone, END)], [(a, END), (b, END)]]
        thread = threading.Thread(target=lambda: [streams.publish(publication) for publication in publications])
        thread.start()
        return [await read(mailbox) for mailbox in mailboxes]

    assert run(scenario()) == [[delta("1"), END], [delta("2"), END]]


def test_what_is_published_once_the_loop_has_closed_is_lost_and_nothing_else_happens() -> None:
    loop = asyncio.new_event_loop()
    streams = Streams(loop)
    loop.close()
    streams.publish([])


def test_all_closed_waits_for_the_last() -> None:
    async def scenario() -> tuple[bool, bool]:
        streams = Streams(asyncio.get_running_loop())
        await streams.all_closed()  # at once: there is none
        a, b = make_job("same id"), make_job("same id")
        for job in (a, b):
            streams.open(job)
        waiting = asyncio.ensure_future(streams.all_closed())
        streams.close(a)
        await asyncio.sleep(0)
        before = waiting.done()
        streams.close(b)
        await waiting
        return before, waiting.done()

    assert run(scenario()) == (False, True)
