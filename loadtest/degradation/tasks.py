"""Answers that are known: what a prompt of each length is given to remember, and what must come back.

Format tokens, such as the space before a number, belong to the prompt: a model that is right about the number and wrong
about the space would look forgetful.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from pagestream.loadtest.degradation.server import Server

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the place asked for: first to last
SCORED = 256  # tokens at most that are scored in one trial
FILLERS = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",
    "Rain fell on the old town. People walked home. Lamps were lit. A dog barked. It was late. ",
)
_NAMES = (
    *("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty", "knoll", "lagoon"),
    *("maple", "north", "ocean", "prism", "quarry", "ridge", "stone", "tower", "umber", "valley", "willow", "zenith"),
)


@dataclass(frozen=True)
class Trial:
    length: int  # tokens wanted, of prompt and answer
    prompt: list[int]
    answer: list[int]
    group: int  # trials of a group share most of their prompt: groups are what is independent
    depth: float | None = None


def copy_trials(words: Sequence[int], length: int, groups: int, seed: int) -> Iterator[Trial]:
    """Random words, then the same again: the last tokens of the second time are scored, all but the first word, which
    nothing announces."""
    for group in range(groups):
        random = Random(f"{seed} copy {length} {group}")
        once = random.choices(words, k=length // 2)
        scored = min(SCORED, len(once) - 1)
        yield Trial(length, once + once[:-scored], once[-scored:], group)


def key_value_trials(server: Server, length: int, groups: int, seed: int) -> Iterator[Trial]:
    """Lines `word-123: 45678`, as many as fit; of each list one key at every depth is asked for."""
    for group in range(groups):
        random = Random(f"{seed} key-value {length} {group}")
        head = server.encode("Remember these numbers.\n")
        lines, room = [], length - len(head) - 30  # for the question and the answer
        keys: dict[str, str] = {}
        body: list[int] = []
        while True:
            key = f"{random.choice(_NAMES)}-{random.randrange(100, 1000)}"
            value = f"{random.randrange(10_000, 100_000)}"
            line = server.encode(f"{key}: {value}\n")
            if len(body) + len(line) > room:
                break
            if key not in keys:
                keys[key] = value
                lines.append(key)
                body += line
        for depth in DEPTHS:
            key = lines[round(depth * (len(lines) - 1))]
            prompt, answer = _split(server, f"\nThe number again:\n{key}: ", keys[key])
            yield Trial(length, head + body + prompt, answer, group, depth)


def passkey_trials(server: Server, length: int, groups: int, seed: int) -> Iterator[Trial]:
    """One number in repeated filler, at every depth."""
    for group in range(groups):
        random = Random(f"{seed} passkey {length} {group}")
        filler = server.encode(FILLERS[group % len(FILLERS)])
        for depth in DEPTHS:
            value = f"{random.randrange(10_000, 100_000)}"
            needle = server.encode(f"\nThe pass key is {value}. Remember it.\n")
            prompt, answer = _split(server, "\nWhat is the pass key? The pass key is ", value)
            room = max(0, length - len(needle) - len(prompt) - len(answer))
            hay = (filler * (room // len(filler) + 1))[:room]
            place = round(depth * room)
            yield Trial(length, hay[:place] + needle + hay[place:] + prompt, answer, group, depth)


def perplexity_trials(text: Sequence[int], lengths: Sequence[int], groups: int) -> Iterator[Trial]:
    """The same target tokens after more and more of the text before them, in windows that do not overlap."""
    longest = max(lengths)
    for group in range(min(groups, len(text) // longest)):
        window = text[group * longest : (group + 1) * longest]
        for length in lengths:
            yield Trial(length, list(window[-length:-SCORED]), list(window[-SCORED:]), group)


def _split(server: Server, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a question and of its answer as they are written together, where the tokenizer keeps them apart."""
    prompt, both = server.encode(question), server.encode(question + answer)
    if both[: len(prompt)] == prompt and len(both) > len(prompt):
        return prompt, both[len(prompt) :]
    return prompt, server.encode(answer)
