"""Prompts with known answers, of several lengths: what the canaries ask, the same at each start of a model.

Copy: random tokens, shown twice; the answer is the end of the second time. Key-value: lines such as "river-123: 45678",
one of which is asked for; the answer is its number. Both fall when a model loses hold of what is far back: when rotary
scaling is wrong, cached keys are damaged or pages belong to somebody else. Neither predicts how good answers are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from pagestream.model.tokenizer import Tokenizer

LENGTHS = (256, 1024, 4096, 16384)  # tokens, prompt and answer
_MOST_COPIED = 64  # tokens of a copy that are scored
_WORDS = ("river", "stone", "cloud", "table", "green", "paper", "light", "horse", "apple", "music", "winter", "garden")

Task = Literal["copy", "key_value"]


@dataclass(frozen=True, slots=True)
class Probe:
    """At most `length` tokens."""

    task: Task
    length: int
    prompt: list[int]
    answer: list[int]


def make_probes(tokenizer: Tokenizer, vocab_size: int, room: int) -> list[Probe]:
    """Of each task and each length up to `room` tokens, the shortest first."""
    lengths = [length for length in LENGTHS if length <= room]
    return [make(tokenizer, vocab_size, length) for length in lengths for make in (_copy, _key_value)]


def _copy(tokenizer: Tokenizer, vocab_size: int, length: int) -> Probe:
    ordinary = sorted(set(range(min(vocab_size, tokenizer.vocab_size))) - tokenizer.special_token_ids)
    start = _start(tokenizer)
    once = random.Random(length).choices(ordinary, k=(length - len(start)) // 2)  # noqa: S311 - no secret
    scored = min(_MOST_COPIED, len(once) // 2)
    return Probe("copy", length, [*start, *once, *once[:-scored]], once[-scored:])


def _key_value(tokenizer: Tokenizer, _vocab_size: int, length: int) -> Probe:
    """As many lines as fit; the first is asked for, which is the farthest away."""
    chance = random.Random(length)  # noqa: S311 - no secret
    keys = (f"{chance.choice(_WORDS)}-{number}: " for number in chance.sample(range(100, 10_000), length // 4))
    pairs = [(key, str(chance.randrange(10_000, 100_000))) for key in keys]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    asked, value = pairs[0]
    question, whole = encode(asked), encode(asked + value)
    shared = next(i for i in range(len(whole)) if question[i : i + 1] != whole[i : i + 1])
    prompt = _start(tokenizer)
    for key, number in pairs:
        line = encode(f"{key}{number}\n")
        if len(prompt) + len(line) + len(whole) > length:
            break
        prompt += line
    return Probe("key_value", length, prompt + whole[:shared], whole[shared:])


def _start(tokenizer: Tokenizer) -> list[int]:
    """What the model expects before a text."""
    return tokenizer.encode("", add_special_tokens=True)[:1]
