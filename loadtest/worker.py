"""A process that sends: `python -m pagestream.loadtest.worker`, started by run.py.

It reads a plan as a line of JSON, connects, says {"ready": true}, reads the moment at which to begin (on the machine's
monotonic clock), and writes a line for each request that is sent and for each that has ended. Several workers share
the sessions of a plan by index, so they need not speak to each other.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pagestream.loadtest.arrivals import Closed
from pagestream.loadtest.credentials import Credentials
from pagestream.loadtest.faults import Fault
from pagestream.loadtest.plan import Plan
from pagestream.loadtest.record import Record
from pagestream.loadtest.shapes import Session
from pagestream.loadtest.target import Call, Target, TargetError, TargetInfo, connect


class Worker:
    """The sessions of one worker, from a beginning on."""

    def __init__(self, plan: Plan, number: int, target: Target, info: TargetInfo, begin: float) -> None:
        self._plan = plan
        self._number = number
        self._target = target
        self._info = info
        self._begin = begin
        self._running: set[asyncio.Task[None]] = set()

    def _now(self) -> float:
        return self._target.clock() - self._begin

    async def run(self) -> None:
        """Until the last answer, or until it is cancelled, which ends all calls."""
        await asyncio.sleep(-self._now())
        try:
            if isinstance(self._plan.parsed_arrivals(), Closed):
                mine = iter(range(self._number, self._plan.sessions, self._plan.workers))
                await asyncio.gather(*(self._client(mine) for _ in range(self._plan.clients(self._number))))
            else:
                await self._open_loop()
                await asyncio.gather(*self._running)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _open_loop(self) -> None:
        """Sends when it is time, whatever became of what was sent before."""
        for index, at in self._plan.moments():
            if index % self._plan.workers == self._number:
                session = self._plan.session(index, self._info.vocabulary)
                await asyncio.sleep(at - self._now())
                task = asyncio.create_task(self._converse(index, *session, scheduled=at))
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def _client(self, indices: Iterator[int]) -> None:
        for index in indices:
            if self._now() >= self._plan.seconds:
                return
            session = self._plan.session(index, self._info.vocabulary)
            await self._converse(index, *session, scheduled=self._now())

    async def _converse(self, index: int, session: Session, faults: list[Fault | None], scheduled: float) -> None:
        history: list[int] = []
        for number, (turn, fault) in enumerate(zip(session.turns, faults, strict=True)):
            history += turn.tokens
            record = Record(index, number, session.label, len(history), turn.new_tokens, scheduled, sent=self._now())
            record.fault = fault.kind if fault else None
            say(sent=index)
            call = Call(history, turn.new_tokens, self._plan.timeout, fault)
            try:
                history = history + await self._target.send(call, record)
            finally:
                scheduled = self._end(record)
            if record.outcome != "ok":
                return

    def _end(self, record: Record) -> float:
        """Writes it down, with moments from the beginning of the run."""
        record.ended = self._now()
        record.tokens = [moment - self._begin for moment in record.tokens]
        if record.accepted is not None:
            record.accepted -= self._begin
        say(record=asdict(record))
        return record.ended


def say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def _main() -> None:
    order = json.loads(sys.stdin.readline())
    plan = Plan(**order["plan"])
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    target = connect(plan.target, Credentials(**order["credentials"]))
    try:
        info = await target.describe()
        say(ready=True)
        begin = float(await asyncio.to_thread(sys.stdin.readline))
        await Worker(plan, order["number"], target, info, begin).run()
    except TargetError as error:
        say(error=str(error))
    finally:
        await target.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; run.py ends its workers itself
    with suppress(asyncio.CancelledError):
        asyncio.run(_main())
