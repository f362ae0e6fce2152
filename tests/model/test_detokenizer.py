from __future__ import annotations

import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagestream.model.detokenizer import IncrementalDetokenizer, TokenText

BYTES = tuple(bytes([value]) for value in range(256))
PIECES = st.lists(st.binary(max_size=6) | st.text(max_size=3).map(str.encode), max_size=20)


def each_byte_replaced(data: bytes) -> str:
    """Brute force: the shortest valid character at each place, else one U+FFFD for one byte."""
    text = ""
    while data:
        for length in range(1, 5):
            try:
                text += data[:length].decode()
            except UnicodeDecodeError:
                continue
            data = data[length:]
            break
        else:
            text, data = text + "\ufffd", data[1:]
    return text


def oracle(data: bytes, *, each_byte: bool) -> str:
    return each_byte_replaced(data) if each_byte else data.decode("utf-8", "replace")


def is_incomplete(tail: bytes) -> bool:
    """Could more bytes still make this one valid character? Python waits for the third byte of a surrogate too."""
    if len(tail) == 2 and tail[0] == 0xED and 0xA0 <= tail[1] <= 0xBF:
        return True
    try:
        tail.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return tail == b""


@settings(deadline=None)
@given(PIECES, st.booleans())
@example([b"\xe2\x82", b"\xe2\x82\xac"], True)
@example([b"\xf0\x9f", b"\x98", b"a"], False)
def test_emits_all_but_an_incomplete_character(pieces: list[bytes], each_byte: bool) -> None:
    detokenizer = IncrementalDetokenizer(TokenText(tuple(pieces), replace_each_byte=each_byte))
    seen, emitted = b"", ""
    for index, piece in enumerate(pieces):
        seen += piece
        emitted += detokenizer.push(index)
        held = [cut for cut in range(4) if is_incomplete(seen[len(seen) - cut :])]
        assert emitted in [oracle(seen[: len(seen) - cut], each_byte=each_byte) for cut in held]
    assert emitted + detokenizer.finish() == oracle(seen, each_byte=each_byte)


@settings(deadline=None)
@given(st.text())
@example("👨‍👩‍👧👍🏽🇫🇷e\u0301\u0323 हिन्दी ภาษาไทย שלום")
@example("\x00\x7f\x80\u07ff\u0800\uffff\U00010000" + chr(sys.maxunicode))
def test_every_character_appears_with_its_last_byte(text: str) -> None:
    detokenizer = IncrementalDetokenizer(TokenText(BYTES))
    for character in text:
        *before, last = character.encode()
        assert [detokenizer.push(byte) for byte in before] == [""] * len(before)
        assert detokenizer.push(last) == character
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(("keep", "expected"), [(False, "ab"), (True, "<s>a<s>b")])
def test_special_tokens(keep: bool, expected: str) -> None:
    text = TokenText((b"a", b"<s>", b"b"), special=frozenset({1}))
    detokenizer = IncrementalDetokenizer(text, keep_special_tokens=keep)
    assert "".join(map(detokenizer.push, [1, 0, 1, 2])) == expected


@pytest.mark.parametrize(("until_text", "expected"), [(False, " a a"), (True, "a a")])
def test_leading_space_goes_with_the_first_token_or_until_there_is_text(until_text: bool, expected: str) -> None:
    text = TokenText((b"", b" ", b" a"), first={1: b"", 2: b"a"}, first_until_text=until_text)
    detokenizer = IncrementalDetokenizer(text)
    assert "".join(map(detokenizer.push, [0, 1, 2, 2])) == expected


@settings(deadline=None)
@given(st.integers(-5, 300))
def test_ids_outside_the_vocabulary_contribute_nothing(token: int) -> None:
    """Models pad their embedding, so such ids can be sampled."""
    expected = chr(token) if 0 <= token < 128 else ""
    assert IncrementalDetokenizer(TokenText(BYTES[:128])).push(token) == expected
