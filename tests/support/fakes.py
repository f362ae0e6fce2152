"""What stands in for a model: a tokenizer of bytes, a runner that says its prompt over and over, an engine on both."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from pagestream.model.chat_template import ChatTemplate
from pagestream.model.detokenizer import TokenText
from pagestream.model.step import Chunk, SampledToken, SamplingParams, StepPlan, StepResult
from pagestream.model.text_stream import TextStream
from pagestream.model.tokenizer import Tokenizer
from pagestream.server.backpressure import ReaderLimits
from pagestream.server.block_pool import BlockPool
from pagestream.server.engine import Engine
from pagestream.server.events import Delta, Event, Failed, Finished
from pagestream.server.inbox import QueueLimits
from pagestream.server.job import Job, Publication, with_others
from pagestream.server.metrics import Metrics
from pagestream.server.observer import Observer
from pagestream.server.pace import Pace
from pagestream.server.request import Request
from pagestream.server.scheduler import Scheduler
from pagestream.server.stats import StatsRequest
from tests.support.waiting import WAIT

END = 256  # the token that ends an answer
LONG = 257  # a token of long text, to fill what lies between server and client
LONG_TEXT = "long text " * 1000
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


class ByteTokenizer(Tokenizer):
    """One token for each byte, one that ends an answer, one of long text."""

    def __init__(
        self, template: str | None = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    ) -> None:
        super().__init__(
            TokenText((*(bytes([byte]) for byte in range(256)), b"<end>", LONG_TEXT.encode()), frozenset({END})),
            bos_token_id=None,
            eos_token_ids=[END],
            chat_template=None if template is None else ChatTemplate(template, {}),
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:  # noqa: ARG002 - it adds none
        return list(text.encode())

    def to_json(self) -> str:
        return "{}"


class EchoRunner:
    """The n-th token of an answer is the n-th of the prompt, which begins again where it ends. A given token has
    log-probability 0 if it is the one before it again, else -1.

    `faults` names requests whose steps raise. Steps begin when they may: `hold` stops them at their beginning.
    """

    def __init__(self) -> None:
        self.faults: dict[str, Exception] = {}
        self.on_step: Callable[[StepPlan], None] = lambda _plan: None
        self._changed = threading.Condition()
        self._begun = 0
        self._allowed = float("inf")

    def step(self, plan: StepPlan) -> StepResult:
        with self._changed:
            self._begun += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._begun <= self._allowed, WAIT)
        self.on_step(plan)
        for chunk in plan.chunks:
            if chunk.request_id in self.faults:
                raise self.faults[chunk.request_id]
        return StepResult(tuple(map(self._answer, plan.chunks)))

    @staticmethod
    def _answer(chunk: Chunk) -> tuple[SampledToken, ...]:
        length = chunk.num_prompt_tokens
        if chunk.given:
            tokens = [*chunk.tokens, chunk.given[-1]]
            return tuple(_score(*tokens[position - 1 : position + 1]) for position in chunk.sampled_positions)
        return tuple(SampledToken(chunk.tokens[position % length]) for position in chunk.sampled_positions)

    def hold(self) -> None:
        """The next step begins only when it is allowed to."""
        with self._changed:
            self._allowed = self._begun

    def allow(self, steps: float = float("inf")) -> None:
        with self._changed:
            self._allowed += steps
            self._changed.notify_all()

    def wait_until_held(self) -> None:
        """Returns when a step wants to begin and may not."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._begun > self._allowed, WAIT)


def _score(before: int, token: int) -> SampledToken:
    return SampledToken(token, 0.0 if token == before else -1.0, ((before, 0.0),))


class Recorder:
    """All events of all requests, as the engine publishes them."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = defaultdict(list)
        self._changed = threading.Condition()

    def publish(self, publication: Publication) -> None:
        with self._changed:
            for job, event in publication:
                self.events[job.request.request_id].append(event)
            self._changed.notify_all()

    def end_of(self, request_id: str) -> Finished | Failed:
        """Waits for the last event."""

        def last() -> Finished | Failed | None:
            return next((e for e in self.events[request_id] if isinstance(e, Finished | Failed)), None)

        with self._changed:
            end = self._changed.wait_for(last, WAIT)
        assert end is not None, f"{request_id} did not end"
        return end

    def text_of(self, request_id: str) -> str:
        return "".join(event.text for event in self.events[request_id] if isinstance(event, Delta))


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """An engine whose parts a test can reach. Starts at once; `close` ends its thread."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        publish: Callable[[Publication], None] | None = None,
        on_fault: Callable[[], None] | None = None,
        num_blocks: int = 64,
        block_size: int = 16,
        token_budget: int = 64,
        max_running: int = 8,
        limits: QueueLimits | None = None,
        readers: ReaderLimits | None = None,
        target_gap: float = 1e6,
        speculation: bool = False,
        attention_every: int = 0,
        runner: EchoRunner | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics
        self.runner = runner or EchoRunner()
        self.recorder = Recorder()
        self.gone = threading.Event()
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(
            self.pool, token_budget=token_budget, max_running=max_running, speculation=speculation
        )
        self.engine = Engine(
            self.pool,
            self.scheduler,
            self.runner,
            metrics,
            limits or QueueLimits(1000, 1_000_000),
            readers or ReaderLimits(10_000, 1e9),  # a Recorder reads nothing
            Pace(target_gap),
            Observer(metrics, attention_every, clock),
            publish or self.recorder.publish,
            on_fault or self.gone.set,
            clock,
        )
        self.engine.start()

    def submit(self, request_id: str, **settings: Any) -> Job:
        job = make_job(request_id, received=self.engine.clock(), **settings)
        self.engine.inbox.submit(job)
        return job

    def close(self) -> None:
        self.runner.allow()
        self.engine.stop()


def make_job(
    request_id: str,
    prompt: str = "abc",
    max_new_tokens: int = 6,
    received: float = 0.0,
    deadline: float | None = None,
    queue_deadline: float | None = None,
    stop_strings: tuple[str, ...] = (),
    progress_interval: float = 0.0,
    stats: StatsRequest | None = None,
) -> Job:
    tokens = list(prompt.encode())
    return Job(
        Request(request_id, tokens, SamplingParams(), max_new_tokens, eos_token_ids=frozenset({END})),
        TextStream(ByteTokenizer(), stop_strings),
        received,
        deadline,
        queue_deadline,
        progress_interval,
        stats=stats or StatsRequest(),
    )


def make_scored(request_id: str, prompt: str, answer: str, received: float, *, internal: bool = False) -> Job:
    """A job that scores a given answer."""
    read, given = list((prompt + answer[:-1]).encode()), list(answer.encode())
    request = Request(request_id, read, SamplingParams(logprobs=1), 1, given=given)
    return Job(request, TextStream(ByteTokenizer()), received, internal=internal)


def make_answers(request_id: str, count: int, **settings: Any) -> list[Job]:
    """Jobs for several answers to one prompt."""
    first = make_job(request_id, **settings)
    return with_others(first, [deepcopy(first.text) for _ in range(1, count)])
