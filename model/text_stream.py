"""The text of one answer as it grows, cut exactly where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pagestream.model.detokenizer import IncrementalDetokenizer
from pagestream.model.tokenizer_base import Tokenizer


class Piece(NamedTuple):
    """What one token adds to the answer."""

    text: str
    matched_stop: str | None  # this stop string ended the answer; push no more


class TextStream:
    """Detokenises and cuts stop strings; one `push` costs a few microseconds, however long text and stops are.

    The stop string that is complete first ends the answer; of several complete at the same character the longest
    (it begins first, so nothing of any of them is emitted). The result does not depend on how the text is spread over
    tokens. Withheld is exactly the longest end of the text that is a proper prefix of a stop string, because more is
    never needed and less could leak.

    With `min_tokens`, the text of the tokens before number `min_tokens` takes no part: a stop string must begin after
    it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        *,
        keep_special_tokens: bool = False,
        min_tokens: int = 0,
        continues_text: bool = False,
    ) -> None:
        """`continues_text`: the answer goes on where a text stopped, so a space before its first word is part of it;
        otherwise it is a text of its own. Raises ValueError for an empty stop string.
        """
        self._detokenizer = IncrementalDetokenizer(
            tokenizer.text, keep_special_tokens=keep_special_tokens, continues_text=continues_text
        )
        self._matchers = [_Matcher(stop) for stop in stop_strings]
        self._exempt_tokens = max(min_tokens - 1, 0)
        self._withheld = ""

    def push(self, token_id: int) -> Piece:
        """What may be shown now that this token is known."""
        text = self._detokenizer.push(token_id)
        if self._exempt_tokens > 0:
            self._exempt_tokens -= 1
            return Piece(text, None)
        return self._scan(text) if self._matchers else Piece(text, None)

    def finish(self) -> str:
        """What is left once the answer ended otherwise than by a stop string."""
        return self._scan(self._detokenizer.finish()).text + self._withheld

    def _scan(self, text: str) -> Piece:
        pending = self._withheld + text
        for end, character in enumerate(text, start=len(self._withheld) + 1):
            complete = [matcher.stop for matcher in self._matchers if matcher.advance(character)]
            if complete:
                stop = max(complete, key=len)
                self._withheld = ""
                return Piece(pending[: end - len(stop)], stop)
        keep = len(pending) - max((matcher.matched for matcher in self._matchers), default=0)
        self._withheld = pending[keep:]
        return Piece(pending[:keep], None)


class _Matcher:
    """Knuth, Morris and Pratt: `matched` is the length of the longest end of the text that begins the stop string."""

    def __init__(self, stop: str) -> None:
        if not stop:
            raise ValueError("a stop string needs at least one character")
        self.stop = stop
        self.matched = 0
        self._shorter = [0]  # by length: the next shorter prefix of the stop string that also ends this one
        for character in stop[1:]:
            self._shorter.append(self._extend(self._shorter[-1], character))

    def advance(self, character: str) -> bool:
        """Is the stop string complete with this character?"""
        self.matched = self._extend(self.matched, character)
        return self.matched == len(self.stop)

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.stop[matched] == character)
