"""The targets that are up: all paused but the one that is measured."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from peers.jobs import Client, FailedError, Job
from peers.process import Process
from peers.targets import Capacity, Target

START_SECONDS = 300.0  # vLLM compiles at each start


@dataclass(frozen=True)
class Running:
    command: list[str]
    process: Process
    client: Client
    ready_s: float  # from the start of the process to its own word that it is ready


class Fleet:
    """Used by one task. `warm_up` draws a prompt that wakes a target's caches after a pause."""

    def __init__(self, logs: Path, warm_up: Callable[[], list[int]]) -> None:
        self._logs = logs
        self._warm_up = warm_up
        self._running: dict[str, Running] = {}

    @contextlib.asynccontextmanager
    async def use(self, target: Target, capacity: Capacity, *, fresh: bool) -> AsyncIterator[Running]:
        """The target, awake, alone and warm, or `fresh` from its start. It is ended if the body raises."""
        command = target.command(capacity)
        running = self._running.get(target.name)
        if running is not None and (fresh or running.command != command):
            await self._end(target.name)
            running = None
        if running is None:
            running = await self._start(target, command)
        running.process.resume()
        try:
            if not fresh:
                await running.client.run([Job(self._warm_up(), 4)])
            yield running
        except BaseException:
            await self._end(target.name)
            raise
        running.process.pause()

    async def end(self) -> None:
        for name in list(self._running):
            await self._end(name)

    async def _start(self, target: Target, command: list[str]) -> Running:
        begun = time.perf_counter()
        log = self._logs / f"{target.name}.log"
        process = await Process.start(command, target.environment, log, worker=target.worker)
        try:
            client = await asyncio.wait_for(target.connect(process), START_SECONDS)
        except BaseException:
            await process.end()
            raise
        running = Running(command, process, client, time.perf_counter() - begun)
        self._running[target.name] = running
        return running

    async def _end(self, name: str) -> None:
        running = self._running.pop(name)
        await running.client.close()
        await running.process.end()


def reason(error: Exception) -> str:
    """Why a target failed, in one line."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, FailedError) else f"{type(error).__name__}: {text}"
