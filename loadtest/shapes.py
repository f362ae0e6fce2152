"""What requests look like. A session is one prompt, or several turns that each wait for the answer before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from random import Random

from pagestream.loadtest.spec import require
from pagestream.loadtest.trace import read_trace


@dataclass(frozen=True)
class Turn:
    """Tokens that the user adds, and how long the answer is to be."""

    tokens: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Session:
    label: str  # which part of a mixture it is
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Vocabulary:
    """Tokens that prompts are made of: all but the special ones, so that lengths are exact and nothing repeats."""

    size: int
    special: frozenset[int] = frozenset()

    def draw(self, random: Random, count: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < count:
            drawn = random.choices(range(self.size), k=count - len(tokens))
            tokens += [token for token in drawn if token not in self.special]
        return tokens


class Shape(ABC):
    """A session depends on the seed and its index alone, so that any number of workers sends the same ones."""

    def session(self, seed: int, index: int, vocabulary: Vocabulary) -> Session:
        return self._draw(Random(f"{seed} session {index}"), seed, index, vocabulary)

    @abstractmethod
    def _draw(self, random: Random, seed: int, index: int, vocabulary: Vocabulary) -> Session: ...


def _check(**lengths: int) -> None:
    for name, value in lengths.items():
        require(value >= 1, f"{name} must be at least 1")


@dataclass(frozen=True)
class Fixed(Shape):
    """Prompts of one length."""

    prompt: int = 128
    output: int = 64

    def __post_init__(self) -> None:
        _check(prompt=self.prompt, output=self.output)

    def _draw(self, random: Random, seed: int, index: int, vocabulary: Vocabulary) -> Session:  # noqa: ARG002
        return Session(f"{self.prompt}", (Turn(vocabulary.draw(random, self.prompt), self.output),))


@dataclass(frozen=True)
class Bimodal(Shape):
    """Short prompts, and long ones among them: the case in which long prompts cost the others."""

    short: int = 64
    long: int = 2048
    share: float = 0.2  # of the long ones
    output: int = 64

    def __post_init__(self) -> None:
        _check(short=self.short, long=self.long, output=self.output)
        require(0 <= self.share <= 1, "share must be from 0 to 1")

    def _draw(self, random: Random, seed: int, index: int, vocabulary: Vocabulary) -> Session:  # noqa: ARG002
        is_long = random.random() < self.share
        length = self.long if is_long else self.short
        return Session("long" if is_long else "short", (Turn(vocabulary.draw(random, length), self.output),))


@dataclass(frozen=True)
class Ladder(Shape):
    """Every length in turn."""

    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    output: int = 64

    def __post_init__(self) -> None:
        _check(lengths=min(self.lengths), output=self.output)

    def _draw(self, random: Random, seed: int, index: int, vocabulary: Vocabulary) -> Session:  # noqa: ARG002
        length = self.lengths[index % len(self.lengths)]
        return Session(f"{length}", (Turn(vocabulary.draw(random, length), self.output),))


@dataclass(frozen=True)
class SharedPrefix(Shape):
    """Prompts that begin alike, as under a system prompt: `groups` prefixes, each followed by a suffix of its own."""

    prefix: int = 512
    suffix: int = 64
    groups: int = 4
    output: int = 64

    def __post_init__(self) -> None:
        _check(prefix=self.prefix, suffix=self.suffix, groups=self.groups, output=self.output)

    def _draw(self, random: Random, seed: int, index: int, vocabulary: Vocabulary) -> Session:  # noqa: ARG002
        group = random.randrange(self.groups)
        prefix = vocabulary.draw(Random(f"{seed} prefix {group}"), self.prefix)
        return Session(f"group {group}", (Turn(prefix + vocabulary.draw(random, self.suffix), self.output),))


@dataclass(frozen=True)
class MultiTurn(Shape):
    """Conversations: each turn's prompt is all that was said, and `user` tokens more."""

    turns: int = 4
    user: int = 64
    output: int = 64

    def __post_init__(self) -> None:
        _check(turns=self.turns, user=self.user, output=self.output)

    def _draw(self, random: Random, seed: int, index: int, vocabulary: Vocabulary) -> Session:  # noqa: ARG002
        turns = [Turn(vocabulary.draw(random, self.user), self.output) for _ in range(self.turns)]
        return Session("conversation", tuple(turns))


@dataclass(frozen=True)
class TraceShape(Shape):
    """The lengths of a recorded trace; begins again where it ends."""

    file: Path

    def __post_init__(self) -> None:
        read_trace(self.file)

    def _draw(self, random: Random, seed: int, index: int, vocabulary: Vocabulary) -> Session:  # noqa: ARG002
        entries = read_trace(self.file)
        entry = entries[index % len(entries)]
        return Session("trace", (Turn(vocabulary.draw(random, entry.prompt_tokens), entry.output_tokens),))


SHAPES: dict[str, type[Shape]] = {
    "fixed": Fixed,
    "bimodal": Bimodal,
    "ladder": Ladder,
    "shared-prefix": SharedPrefix,
    "multi-turn": MultiTurn,
    "trace": TraceShape,
}
