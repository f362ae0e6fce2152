"""The card: every part measured against one server, as one JSON document from which the page is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pagestream.loadtest.degradation import tasks
from pagestream.loadtest.degradation.control import NEGLIGIBLE, measure_control
from pagestream.loadtest.degradation.dilution import measure_dilution
from pagestream.loadtest.degradation.interference import VICTIMS, measure_interference
from pagestream.loadtest.degradation.latency import NEW_TOKENS, lengths_up_to, measure_latency
from pagestream.loadtest.degradation.quality import score_all, summarize_fillers, summarize_pairs, summarize_task
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


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    longest: int | None  # tokens; None: what the model and the server's KV pool take
    per_octave: int  # prompt lengths of the latency part
    repeats: int
    intrusions: int  # of each length among streams that decode
    texts: int  # windows of dilution and paired perplexity
    groups: int  # of trials for each length: copies, and lists of which one number at each depth is asked for
    passkey_groups: int  # the two fillers in turn
    controls: int  # copies of each length that a reference scores too, beside one list of lookups


FULL = Effort(longest=None, per_octave=2, repeats=5, intrusions=5, texts=6, groups=40, passkey_groups=8, controls=3)
QUICK = Effort(longest=1024, per_octave=1, repeats=3, intrusions=2, texts=3, groups=4, passkey_groups=2, controls=1)


def measure_card(
    server: Server,
    parts: Sequence[str],
    effort: Effort,
    metrics: MetricsPage | None,
    seed: int,
    progress: Progress[Any],
    reference: Server | None = None,
) -> dict[str, Any]:
    """The document. A part that the server does not report is {"not_reported": why}; without a reference there is no
    control. Raises TargetError."""
    model = server.model()
    longest = min(int(model["max_context_tokens"]), int(model["kv_capacity_tokens"]), effort.longest or math.inf)
    special = frozenset([*model.get("eos_token_ids", ()), *filter(None, [model.get("bos_token_id")])])
    vocabulary = Vocabulary(int(model["vocab_size"]), special)
    card: dict[str, Any] = {"version": VERSION, "model": model, "caveats": list(CAVEATS)}
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "latency": lambda: asdict(
            measure_latency(
                server,
                vocabulary,
                lengths_up_to(int(longest) - NEW_TOKENS, per_octave=effort.per_octave),
                effort.repeats,
                metrics,
                seed,
                progress,
            )
        ),
        "interference": lambda: _interference(server, vocabulary, int(longest), effort, seed, progress),
        "dilution": lambda: _dilution(server, int(longest), effort, progress),
        "quality": lambda: _quality(server, int(longest), effort, seed, progress),
    }
    if reference is not None:
        measures["control"] = lambda: _control(server, reference, int(longest), effort, seed, progress)
    for part in (each for each in parts if each in measures):
        try:
            measured = measures[part]()
        except NotReportedError as error:
            measured = {"not_reported": f"not reported by this server: {error}"}
        card[part] = {**measured, "measured": {**environment(), "seed": seed, "effort": asdict(effort)}}
    return card


def _octaves(shortest: int, longest: int) -> list[int]:
    return [2**power for power in range(shortest.bit_length() - 1, int(longest).bit_length()) if 2**power <= longest]


def _interference(
    server: Server, vocabulary: Vocabulary, longest: int, effort: Effort, seed: int, progress: Progress[Any]
) -> dict[str, Any]:
    lengths = [min(length, longest - 1) for length in _octaves(min(512, longest), longest)]
    points = measure_interference(server, vocabulary, lengths, effort.intrusions, seed, progress)
    return {"victims": VICTIMS, "points": [asdict(point) for point in points]}


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


def _quality(server: Server, longest: int, effort: Effort, seed: int, progress: Progress[Any]) -> dict[str, Any]:
    text = read_text(server, longest * effort.texts)
    words = words_of(server, text[:20_000])

    def run(name: str, trials: Iterator[tasks.Trial]) -> list[Any]:
        every = list(trials)
        return score_all(server, every, lambda each: progress(each, len(each), name))

    copies = [t for n in _octaves(32, longest) for t in tasks.copy_trials(words, n, effort.groups, seed)]
    pairs = [t for n in _octaves(128, longest) for t in tasks.key_value_trials(server, n, effort.groups, seed)]
    keys = [t for n in _octaves(256, longest) for t in tasks.passkey_trials(server, n, effort.passkey_groups, seed)]
    passkeys = run("passkey", iter(keys))
    paired = tasks.perplexity_trials(text, _octaves(2 * tasks.SCORED, longest), effort.texts)
    digit = {"accuracy": 0.1, "exact": 1e-5, "logprob": math.log(0.1)}
    word = {"accuracy": 1 / len(words), "exact": 0.0, "logprob": -math.log(len(words))}
    return {
        "copy": asdict(
            summarize_task(
                run("copy", iter(copies)),
                "accuracy",
                word,
                f"{len(words)} English words in random order, twice; the last {tasks.SCORED} tokens of the second time",
                effective=True,
            )
        ),
        "key_value": asdict(
            summarize_task(
                run("key-value", iter(pairs)),
                "exact",
                digit,
                "lines such as amber-123: 45678, one asked for at five depths of each list; five digits",
                effective=True,
            )
        ),
        "passkey": asdict(
            summarize_task(
                passkeys,
                "exact",
                digit,
                "one number in repeated filler, at five depths: a sanity check that most models pass",
                effective=False,
            )
        ),
        "fillers": {name: asdict(value) for name, value in summarize_fillers(passkeys).items()},
        "perplexity": [asdict(point) for point in summarize_pairs(run("perplexity", paired))],
        "text": NAME,
    }


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
