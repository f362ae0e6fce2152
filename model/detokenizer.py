"""Token ids to text, one token at a time, without ever emitting half a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8


@dataclass(frozen=True, slots=True)
class TokenText:
    """What every token contributes to a text. Bytes, because a character may be spread over several tokens."""

    data: tuple[bytes, ...]  # by token id; empty where the vocabulary has a hole
    special: frozenset[int] = frozenset()  # tokens that a text normally leaves out
    # Tokens that contribute something else as the first of a text: SentencePiece puts a space before a text when it
    # encodes and takes one away when it decodes.
    first: Mapping[int, bytes] = field(default_factory=dict)
    # After a first token that came out empty, is the next one first again? So it is with SentencePiece models that
    # remove extra whitespace.
    first_until_text: bool = False
    # One U+FFFD for each invalid byte (SentencePiece, byte fallback), or one for each maximal part of a broken
    # character, as Unicode recommends (byte-level BPE).
    replace_each_byte: bool = False


class IncrementalDetokenizer:
    """Turns tokens into text as they come; at most 3 bytes, an incomplete character, are held back.

    What `push` returned so far and `finish` together are the text of all tokens. Ids outside the vocabulary (models
    pad their embedding) contribute nothing. Tokens that are skipped do not end a character: bytes around them join.
    """

    def __init__(self, text: TokenText, *, keep_special_tokens: bool = False, continues_text: bool = False) -> None:
        """`continues_text`: other text stands before, so no token here is the first of a text."""
        self._text = text
        self._skipped = frozenset() if keep_special_tokens else text.special
        self._first = not continues_text
        errors = "surrogateescape" if text.replace_each_byte else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int) -> str:
        """The characters that this token completes; may be empty."""
        if token_id in self._skipped or not 0 <= token_id < len(self._text.data):
            return ""
        data = self._text.data[token_id]
        if self._first and data:
            data = self._text.first.get(token_id, data)
            self._first = self._text.first_until_text and not data
        return self._replace(self._decoder.decode(data))

    def finish(self) -> str:
        """U+FFFD for an incomplete character at the end, else nothing."""
        return self._replace(self._decoder.decode(b"", final=True))

    def _replace(self, text: str) -> str:
        if text.isascii() or not self._text.replace_each_byte:
            return text
        return _ESCAPED_BYTE.sub("\ufffd", text)
