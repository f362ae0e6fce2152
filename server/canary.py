"""Canaries: prompts with known answers, scored now and then among the clients' requests.

What latency cannot show, they do: the log-probability of the same answer after the same prompt changes only if
something does. One probe at a time; each is computed anew, under a tenant of its own, unless a client interrupted it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from concurrent.futures import Executor
from itertools import cycle

from pagestream.server import scoring
from pagestream.server.errors import GaveWayError, RequestError
from pagestream.server.metric_families import LabelValues
from pagestream.server.metrics import Metrics
from pagestream.server.probes import Probe, make_probes
from pagestream.server.request import Priority
from pagestream.server.served import ServedModel
from pagestream.server.streams import Streams

log = logging.getLogger(__name__)

_REST = 200  # times what a probe took, until the next one: canaries take at most 0.5 % of the time
_SHARE = 4  # a probe takes at most one of so many parts of the KV pool


class Canary:
    """Scores a probe every `interval` seconds, 0 for never, for as long as `run` is not cancelled. A client's request
    ends one that runs; none starts while requests wait. They count as nobody's requests.
    """

    def __init__(
        self, model: ServedModel, streams: Streams, tokenizing: Executor, metrics: Metrics, interval: float
    ) -> None:
        self._model = model
        self._streams = streams
        self._tokenizing = tokenizing
        self._metrics = metrics
        self._interval = interval
        self._runs: Counter[LabelValues] = Counter()  # that ended well, by task and length
        self._first: dict[LabelValues, float] = {}
        self._last: dict[LabelValues, float] = {}

    async def run(self) -> None:
        if not self._interval:
            return
        model, loop = self._model, asyncio.get_running_loop()
        room = min(model.max_context, model.kv_capacity_tokens // _SHARE)
        probes = await loop.run_in_executor(self._tokenizing, make_probes, model.tokenizer, model.vocab_size, room)
        await asyncio.sleep(self._interval)
        for probe in cycle(probes):
            started = time.monotonic()
            self._metrics.book([("canary_runs_total", 1, (await self._try(probe),))])
            await asyncio.sleep(max(self._interval, _REST * (time.monotonic() - started)))

    async def _try(self, probe: Probe) -> str:
        """What came of it."""
        if self._model.engine.inbox.num_waiting:
            return "skipped"
        try:
            logprob = await self._score(probe)
        except GaveWayError:
            return "skipped"
        except RequestError as error:
            log.warning("canary %s of %d tokens: %s", probe.task, probe.length, error)
            return "failed"
        labels = probe.task, str(probe.length)
        self._first.setdefault(labels, logprob)
        self._last[labels] = logprob
        self._metrics.set_gauges({"canary_baseline_logprob": dict(self._first), "canary_logprob": dict(self._last)})
        self._runs[labels] += 1
        return "ok"

    async def _score(self, probe: Probe) -> float:
        """Mean log-probability of the answer's tokens. Raises RequestError."""
        engine = self._model.engine
        jobs = scoring.scoring_jobs(
            [probe.prompt],
            probe.answer,
            self._model,
            tenant=f"canary {probe.task} {probe.length} {self._runs[probe.task, str(probe.length)]}",
            priority=Priority.LOW,
            received=engine.clock(),
            internal=True,
        )
        [score] = await scoring.scores(jobs, scoring.submit(jobs, engine, self._streams), engine, self._streams)
        return sum(score.logprobs) / len(score.logprobs)
