from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.detokenizer import TokenText
from pagestream.model.text_stream import TextStream
from pagestream.model.tokenizer_base import Tokenizer


class Tokens(Tokenizer):
    """Token `i` contributes `pieces[i]`."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        super().__init__(TokenText(tuple(pieces)), bos_token_id=None, eos_token_ids=(), chat_template=None)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        raise NotImplementedError

    def to_json(self) -> str:
        raise NotImplementedError


def run(pieces: Sequence[bytes], stops: Sequence[str], min_tokens: int = 0) -> tuple[list[str], str | None]:
    """What each push emitted, then what finish did; and the stop string that ended it."""
    stream = TextStream(Tokens(pieces), stops, min_tokens=min_tokens)
    emitted = []
    for token in range(len(pieces)):
        piece = stream.push(token)
        emitted.append(piece.text)
        if piece.matched_stop is not None:
            return emitted, piece.matched_stop
    return [*emitted, stream.finish()], None


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Brute force over the whole text: the first place where a stop string ends; of several the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def longest_open_end(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text that is a proper prefix of a stop string."""
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


LETTERS = st.text("ab€", min_size=1, max_size=5)
STOPS = st.lists(LETTERS, min_size=1, max_size=4)


@settings(deadline=None)
@given(st.text("ab€", max_size=20), STOPS, st.data())
def test_any_split_gives_the_text_before_the_first_stop(text: str, stops: list[str], data: st.DataObject) -> None:
    """A small alphabet makes stop strings overlap themselves and each other; splits fall inside characters too."""
    raw = text.encode()
    places = sorted(data.draw(st.sets(st.integers(0, len(raw)))))
    pieces = [raw[a:b] for a, b in zip([0, *places], [*places, len(raw)], strict=True)]
    emitted, matched = run(pieces, stops)
    assert ("".join(emitted), matched) == cut(text, stops)


@settings(deadline=None)
@given(st.lists(LETTERS, max_size=8), STOPS)
def test_withholds_exactly_the_longest_open_end(pieces: list[str], stops: list[str]) -> None:
    emitted, matched = run([piece.encode() for piece in pieces], stops)
    shown = ""
    for count, text in enumerate(emitted[: len(pieces)], start=1):
        shown += text
        seen = "".join(pieces[:count])
        if matched is None or count < len(emitted):
            assert shown == seen[: len(seen) - longest_open_end(seen, stops)]


@pytest.mark.parametrize("stop", ["</s>", "\n\nHuman:", "aab", "🛑é", "###"])
def test_every_split_of_a_stop_string(stop: str) -> None:
    """All 2^(n-1) ways to spread the bytes of one stop string, up to ten bytes, over tokens."""
    raw = stop.encode()[:10]
    stop = raw.decode()
    for count in range(len(raw)):
        for places in combinations(range(1, len(raw)), count):
            pieces = [raw[a:b] for a, b in zip((0, *places), (*places, len(raw)), strict=True)]
            emitted, matched = run([b"before ", *pieces, b" after"], [stop, "never"])
            assert (emitted[0], "".join(emitted[1:]), matched) == ("before ", "", stop)


def test_the_longest_wins_at_the_same_end_and_the_first_end_wins_otherwise() -> None:
    assert run([b"xabc"], ["c", "abc", "bc"]) == (["x"], "abc")
    assert run([b"xabcd"], ["abcd", "bc"]) == (["xa"], "bc")


@settings(deadline=None)
@given(st.lists(LETTERS, max_size=8), STOPS, st.integers(0, 9))
def test_stops_begin_with_the_token_number_min_tokens(pieces: list[str], stops: list[str], min_tokens: int) -> None:
    exempt = max(min_tokens - 1, 0)
    emitted, matched = run([piece.encode() for piece in pieces], stops, min_tokens)
    text, stop = cut("".join(pieces[exempt:]), stops)
    assert ("".join(emitted), matched) == ("".join(pieces[:exempt]) + text, stop)


def test_an_unfinished_character_and_an_unfinished_stop_come_out_at_the_end() -> None:
    assert run([b"a<", b"/", "é".encode()[:1]], ["</s>"]) == (["a", "", "", "</\ufffd"], None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        TextStream(Tokens([]), [""])
