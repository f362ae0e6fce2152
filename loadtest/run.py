"""Runs a plan: starts the workers, gathers what they write, watches the server, and leaves a folder behind.

manifest.json  what was run, where, against what
requests.jsonl a line for each request, with a stamp for each token
server.jsonl   a few of the server's gauges, twice a second
summary.json   the numbers
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pagestream.loadtest.credentials import ANONYMOUS, Credentials
from pagestream.loadtest.manifest import environment
from pagestream.loadtest.measures import Objectives
from pagestream.loadtest.plan import Plan
from pagestream.loadtest.record import Record
from pagestream.loadtest.scrape import MetricsPage, Series, deltas, watch
from pagestream.loadtest.summary import summarize
from pagestream.loadtest.target import TargetError, TargetInfo, connect

_LEAD = 0.2  # seconds between the order to begin and the beginning: every worker has read it by then
_CONNECT_SECONDS = 60.0  # for a worker to import and to connect
_END_SECONDS = 10.0  # for a worker to end what it is told to end


@dataclass
class Progress:
    """What has come of a run so far."""

    sent: int = 0
    records: list[Record] = field(default_factory=list)
    begin: float = 0.0  # monotonic


async def run(
    plan: Plan,
    objectives: Objectives,
    metrics: MetricsPage | None,
    folder: Path,
    show: Callable[[Progress], None],
    credentials: Credentials = ANONYMOUS,
) -> dict[str, Any]:
    """The summary, which is also written. Without `metrics` the server's view is left out; where it was lost meanwhile,
    "server_lost" says so. `show` is called a few times a second. Cancelling it ends the calls and writes down what
    there is.

    Raises TargetError if the server cannot be reached, or a worker fails.
    """
    info = await _describe(plan, credentials)
    before = await _scrape(metrics)
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    manifest = {"plan": asdict(plan), "objectives": asdict(objectives), "target": asdict(info), **environment()}
    manifest["target"]["vocabulary"] = info.vocabulary.size
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    with suppress(asyncio.CancelledError):
        await _work(plan, credentials, metrics, folder, progress, show)
    grown, lost = None, None
    try:
        after = await _scrape(metrics)
        grown = deltas(before, after) if before is not None and after is not None else None
    except TargetError as error:
        lost = str(error)  # what was measured is kept
    summary = {**summarize(progress.records, objectives, grown), "server_lost": lost}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary


async def _describe(plan: Plan, credentials: Credentials) -> TargetInfo:
    target = connect(plan.target, credentials)
    try:
        return await target.describe()
    finally:
        await target.close()


async def _scrape(page: MetricsPage | None) -> Series | None:
    if page is None:
        return None
    try:
        return await asyncio.to_thread(page.read)
    except (OSError, ValueError) as error:
        raise TargetError(f"no metrics at {page.url} ({error}); --no-server-metrics goes without") from error


@asynccontextmanager
async def _beside(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs them while the block runs."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _work(
    plan: Plan,
    credentials: Credentials,
    metrics: MetricsPage | None,
    folder: Path,
    progress: Progress,
    show: Callable[[Progress], None],
) -> None:
    workers = await asyncio.gather(*(_start(plan, credentials, number) for number in range(plan.workers)))
    try:
        for process in workers:
            message = await asyncio.wait_for(_read(process), _CONNECT_SECONDS)
            if message is None or "ready" not in message:
                raise TargetError((message or {}).get("error", "a worker died before it was ready"))
        progress.begin = time.monotonic() + _LEAD
        for process in workers:
            _stdin(process).write(f"{progress.begin}\n".encode())
        beside = [_show(progress, show)]
        if metrics is not None:
            beside.append(watch(metrics, folder / "server.jsonl", progress.begin))
        with (folder / "requests.jsonl").open("w") as lines:
            async with _beside(*beside):
                await asyncio.gather(*(_gather(process, progress, lines.write) for process in workers))
    finally:
        await asyncio.gather(*map(_end, workers))


async def _start(plan: Plan, credentials: Credentials, number: int) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pagestream.loadtest.worker"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**26,  # a line holds a stamp for each token of an answer
    )
    order = {"plan": asdict(plan), "credentials": asdict(credentials), "number": number}
    _stdin(process).write(json.dumps(order).encode() + b"\n")
    return process


async def _gather(process: asyncio.subprocess.Process, progress: Progress, write: Callable[[str], object]) -> None:
    """Takes down what a worker writes, until it has ended. Raises TargetError if it ends badly."""
    try:
        while (message := await _read(process)) is not None:
            _take(message, progress, write)
    except asyncio.CancelledError:
        if process.returncode is None:
            process.terminate()  # it ends its calls and writes their records
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                while (message := await _read(process)) is not None:
                    _take(message, progress, write)
        raise
    if await process.wait():
        raise TargetError(f"a worker ended with exit code {process.returncode}")


def _take(message: dict[str, Any], progress: Progress, write: Callable[[str], object]) -> None:
    if "sent" in message:
        progress.sent += 1
    elif "record" in message:
        record = Record.of(message["record"])
        progress.records.append(record)
        write(record.to_json() + "\n")
    else:
        raise TargetError(message["error"])


async def _read(process: asyncio.subprocess.Process) -> dict[str, Any] | None:
    """The next message, None at the end."""
    if process.stdout is None:
        raise TypeError("a worker without a pipe")
    line = await process.stdout.readline()
    return json.loads(line) if line else None


def _stdin(process: asyncio.subprocess.Process) -> asyncio.StreamWriter:
    if process.stdin is None:
        raise TypeError("a worker without a pipe")
    return process.stdin


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _END_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _show(progress: Progress, show: Callable[[Progress], None]) -> None:
    while True:
        show(progress)
        await asyncio.sleep(0.25)
