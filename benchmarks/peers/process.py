"""One target's processes: started, paused while others are measured, counted, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from peers.jobs import FailedError

_SECONDS_TO_END = 5.0
_LINE_LIMIT = 2**26  # bytes: a worker answers with the moments of a whole run in one line


class Process:
    """A command and all its descendants. What it writes goes to `log`; a worker's standard output comes here."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], log: Path, *, worker: bool) -> Self:
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                env={**os.environ, **environment},
                stdin=asyncio.subprocess.PIPE if worker else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if worker else output,
                stderr=output,
                limit=_LINE_LIMIT,
            )
        return cls(process, log)

    @property
    def stdin(self) -> asyncio.StreamWriter:
        if self._process.stdin is None:
            raise ValueError("only a worker has a standard input")
        return self._process.stdin

    @property
    def stdout(self) -> asyncio.StreamReader:
        if self._process.stdout is None:
            raise ValueError("only a worker has a standard output")
        return self._process.stdout

    async def log_until(self, pattern: str) -> str:
        """What it has written, once the pattern is in it."""
        while not re.search(pattern, text := self._log.read_text(errors="replace")):
            self.must_be_alive()
            await asyncio.sleep(0.005)
        return text

    def must_be_alive(self) -> None:
        if self._process.returncode is not None:
            raise FailedError(self.why_it_died())

    def why_it_died(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"it ended with {self._process.returncode}: " + " / ".join(lines[-2:])

    async def wait(self) -> None:
        await self._process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    async def end(self) -> None:
        self.resume()
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), _SECONDS_TO_END)
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self._process.wait()

    def peak_memory(self) -> int:
        """Bytes: the largest resident set of each process, added up; shared pages count in each."""
        total = 0
        for pid in self._tree():
            status = Path(f"/proc/{pid}/status").read_text()
            if match := re.search(r"VmHWM:\s+(\d+) kB", status):
                total += int(match[1]) * 1024
        return total

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._tree():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _tree(self) -> list[int]:
        """Not the process group: some servers put their workers into sessions of their own."""
        found: list[int] = []
        waiting = [self._process.pid] if self._process.returncode is None else []
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):  # a thread that has just ended
                    waiting.extend(int(child) for child in children.read_text().split())
        return found
