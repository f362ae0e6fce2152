"""The card: every part measured against one server, as one JSON document from which the page is drawn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from pagestream.loadtest.degradation import tasks
from pagestream.loadtest.degradation.control import NEGLIGIBLE, measure_control
from pagestream.loadtest.degradation.dilution import measure_dilution
from pagestream.loadtest.degradation.interference import InterferenceRounds
from pagestream.loadtest.degradation.latency import NEW_TOKENS, LatencyRounds, lengths_up_to
from pagestream.loadtest.degradation.quality import (
    Outcome,
    score_all,
    summarize_fillers,
    summarize_pairs,
    summarize_task,
)
from pagestream.loadtest.degradation.server import NotReportedError, Server
from pagestream.loadtest.degradation.text import NAME, read_text, words_of
from pagestream.loadtest.manifest import environment
from pagestream.loadtest.scrape import MetricsPage
from pagestream.loadtest.shapes import Vocabulary
from pagestream.loadtest.statistics import Interval

VERSION = 1  # of the document
PARTS = ("latency", "interference", "dilution", "quality", "control")
CAVEATS = (
    "Attention weights show where value vectors were mixed in one head. They are not an explanation of the output.",
    "Attention numbers are means over heads of a layer group; the few heads that carry retrieval do not show in them.",
    "The first token acts as a sink: idle capacity, not neglect of the prompt. Views labelled rest exclude it.",
    "Entropy tracks length and model, not whether an answer is right.",
    "Synthetic retrieval and copying do not predict how an application fares: test yours.",
    "Seconds hold for this machine with nothing beside it, and up to the longest prompt that was measured.",
    "Causal check of what an answer rested on: InsightService.AblateSpans.",
)

T = TypeVar("T")
Progress = Callable[[Iterable[T], int, str], Iterable[T]]
Piece = Callable[[], dict[str, Any]]  # of a part; raises NotReportedError


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    longest: int | None  # tokens; None: what the model and the server's KV pool take
    per_octave: int  # prompt lengths of the latency part
    rounds: int  # of latency and interference, spread over the time that the rest takes
    texts: int  # windows of dilution and paired perplexity
    groups: int  # of trials for each length: copies, and lists of which one number at each depth is asked for
    passkey_groups: int  # the two fillers in turn
    controls: int  # copies of each length that a reference scores too, beside one list of lookups


FULL = Effort(longest=None, per_octave=2, rounds=9, texts=6, groups=40, passkey_groups=8, controls=3)
QUICK = Effort(longest=1024, per_octave=1, rounds=3, texts=3, groups=4, passkey_groups=2, controls=1)


class Timed(Protocol):
    """A part in seconds, and so in rounds: a machine that others share is not the same a quarter of an hour later, and
    intervals know what lay between the first round and the last."""

    def round(self, progress: Progress[Any]) -> None: ...
    def result(self) -> Any: ...


def measure_card(
    server: Server,
    parts: Sequence[str],
    effort: Effort,
    metrics: MetricsPage | None,
    seed: int,
    progress: Progress[Any],
    reference: Server | None = None,
) -> Iterator[tuple[str, Any]]:
    """The document, a key and its value at a time, each part as it ends. A part that the server does not report is
    {"not_reported": why}; without a reference there is no control. Raises TargetError."""
    model = server.model()
    room = min(int(model["max_context_tokens"]), int(model["kv_capacity_tokens"]), effort.longest or math.inf)
    longest = int(room)
    special = frozenset([*model.get("eos_token_ids", ()), *filter(None, [model.get("bos_token_id")])])
    vocabulary = Vocabulary(int(model["vocab_size"]), special)
    lengths = lengths_up_to(longest - NEW_TOKENS, per_octave=effort.per_octave)
    intruders = [min(length, longest - 1) for length in _octaves(min(512, longest), longest)]
    timed: dict[str, Timed] = {
        "latency": LatencyRounds(server, vocabulary, lengths, metrics, seed),
        "interference": InterferenceRounds(server, vocabulary, intruders, seed),
    }
    pieces: list[tuple[str, Piece]] = [("dilution", lambda: _dilution(server, longest, effort, progress))]
    pieces += [("quality", piece) for piece in _quality(server, longest, effort, seed, progress)]
    if reference is not None:
        pieces.append(("control", lambda: _control(server, reference, longest, effort, seed, progress)))
    origin = {"seed": seed, "effort": asdict(effort)}
    yield "version", VERSION
    yield "model", model
    yield "caveats", list(CAVEATS)
    for part, measured in measure_in_turn(
        {part: each for part, each in timed.items() if part in parts},
        [(part, piece) for part, piece in pieces if part in parts],
        effort.rounds,
        progress,
    ):
        yield part, {**measured, "measured": {**environment(), **origin}}


def measure_in_turn(
    timed: dict[str, Timed], pieces: Sequence[tuple[str, Piece]], rounds: int, progress: Progress[Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parts as they end. Rounds lie before, between and after the pieces, as evenly as these allow; pieces of a part
    follow each other."""
    begun = time.monotonic()
    places = np.linspace(0, len(pieces), rounds).round()
    measured: dict[str, Any] = {}
    for place in range(len(pieces) + 1):
        for _ in range(int((places == place).sum())):
            for each in timed.values():
                each.round(progress)
        for part, piece in pieces[place : place + 1]:
            try:
                measured |= piece()
            except NotReportedError as error:
                measured = {"not_reported": f"not reported by this server: {error}"}
            if part not in [later for later, _ in pieces[place + 1 :]]:
                yield part, measured
                measured = {}
    seconds = time.monotonic() - begun
    for part, each in timed.items():
        yield part, {**asdict(each.result()), "seconds": seconds}


def _octaves(shortest: int, longest: int) -> list[int]:
    return [2**power for power in range(shortest.bit_length() - 1, int(longest).bit_length()) if 2**power <= longest]


def _dilution(server: Server, longest: int, effort: Effort, progress: Progress[Any]) -> dict[str, Any]:
    lengths = [min(length, longest - 32) for length in _octaves(64, longest)]
    text = read_text(server, max(lengths) * effort.texts)
    measured = measure_dilution(server, text, lengths, effort.texts, lambda each: progress(each, len(each), "dilution"))
    return {**asdict(measured), "text": NAME}


def _control(
    server: Server, reference: Server, longest: int, effort: Effort, seed: int, progress: Progress[Any]
) -> dict[str, Any]:
    words = words_of(server, read_text(server, 20_000))
    trials = [
        trial
        for length in _octaves(128, longest)
        for trial in (
            *tasks.copy_trials(words, length, effort.controls, seed),
            *tasks.key_value_trials(server, length, 1, seed),
        )
    ]
    points = measure_control(server, reference, trials, lambda each: progress(each, len(each), "control"))
    return {"reference": reference.model(), "negligible": NEGLIGIBLE, "points": [asdict(point) for point in points]}


def _quality(server: Server, longest: int, effort: Effort, seed: int, progress: Progress[Any]) -> Iterator[Piece]:
    """Its tasks, each of which can be measured at a time of its own."""
    digit = {"accuracy": 0.1, "exact": 1e-5, "logprob": math.log(0.1)}

    def run(name: str, trials: Iterable[tasks.Trial]) -> list[Outcome]:
        every = list(trials)
        return score_all(server, every, lambda each: progress(each, len(each), name))

    def copy() -> dict[str, Any]:
        words = words_of(server, read_text(server, 20_000))
        trials = (t for n in _octaves(32, longest) for t in tasks.copy_trials(words, n, effort.groups, seed))
        chance = {"accuracy": 1 / len(words), "exact": 0.0, "logprob": -math.log(len(words))}
        note = f"{len(words)} English words in random order, twice; the last {tasks.SCORED} tokens of the second time"
        return {"copy": asdict(summarize_task(run("copy", trials), "accuracy", chance, note, effective=True))}

    def key_value() -> dict[str, Any]:
        trials = (t for n in _octaves(128, longest) for t in tasks.key_value_trials(server, n, effort.groups, seed))
        note = "lines such as amber-123: 45678, one asked for at five depths of each list; five digits"
        return {"key_value": asdict(summarize_task(run("key-value", trials), "exact", digit, note, effective=True))}

    def passkey() -> dict[str, Any]:
        groups = effort.passkey_groups
        trials = (t for n in _octaves(256, longest) for t in tasks.passkey_trials(server, n, groups, seed))
        outcomes = run("passkey", trials)
        note = "one number in repeated filler, at five depths: a sanity check that most models pass"
        return {
            "passkey": asdict(summarize_task(outcomes, "exact", digit, note, effective=False)),
            "fillers": {name: asdict(value) for name, value in summarize_fillers(outcomes).items()},
        }

    def perplexity() -> dict[str, Any]:
        text = read_text(server, longest * effort.texts)
        trials = tasks.perplexity_trials(text, _octaves(2 * tasks.SCORED, longest), effort.texts)
        points = summarize_pairs(run("perplexity", trials))
        return {"perplexity": [asdict(point) for point in points], "text": NAME}

    yield from (copy, key_value, passkey, perplexity)


def intervals(document: Any, path: str = "") -> Iterator[tuple[str, Interval]]:
    """Everything in it that has a value and an interval, by where it is."""
    if isinstance(document, dict):
        if document.keys() == {"value", "lower", "upper"}:
            yield path, Interval(**document)
        else:
            for key, value in document.items():
                yield from intervals(value, f"{path}/{key}")
    elif isinstance(document, list):
        for place, value in enumerate(document):
            name = value["tokens"] if isinstance(value, dict) and "tokens" in value else place
            yield from intervals(value, f"{path}/{name}")


@dataclass(frozen=True)
class Disagreement:
    where: str
    before: Interval
    after: Interval


def disagreements(before: dict[str, Any], after: dict[str, Any]) -> tuple[int, list[Disagreement]]:
    """How many numbers both cards have, and those whose 95 % intervals do not even touch."""
    known, new = dict(intervals(before)), dict(intervals(after))
    common = known.keys() & new.keys()
    apart = [
        Disagreement(path, known[path], new[path]) for path in sorted(common) if not _agree(known[path], new[path])
    ]
    return len(common), apart


def _agree(first: Interval, second: Interval) -> bool:
    """Intervals of numbers that are the same every time are points: they may differ by what rounding does."""
    slack = 1e-3 * max(abs(first.value), abs(second.value))
    return first.lower - slack <= second.upper and second.lower - slack <= first.upper
