"""What a tokenizer is to the rest of pagestream, whatever library is behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from pagestream.model.chat_template import ChatTemplate
from pagestream.model.detokenizer import IncrementalDetokenizer, TokenText

MAX_TOKENS = 2**22  # of a vocabulary, with its gaps; sixteen times the largest there is


class Tokenizer(ABC):
    """Text to token ids and back. Nothing changes after construction, so every method may be called from any thread;
    the libraries behind `encode` release the interpreter lock while they work.
    """

    def __init__(
        self,
        text: TokenText,
        *,
        bos_token_id: int | None,
        eos_token_ids: Iterable[int],
        chat_template: ChatTemplate | None,
    ) -> None:
        self.text = text
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the model's own table may be padded beyond it."""
        return len(self.text.data)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that `decode` leaves out unless asked to keep them."""
        return self.text.special

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids. Special tokens written out in `text` become themselves; `add_special_tokens` puts around it what
        the model expects around a text, such as its start token (a rendered chat has that already).
        """

    @abstractmethod
    def to_json(self) -> str:
        """The content of a tokenizer.json that gives the same ids for every text. Raises UnsupportedModelError if there
        is none.
        """

    def decode(self, ids: Iterable[int], *, keep_special_tokens: bool = False) -> str:
        """The text of these tokens; bytes that are not UTF-8 become U+FFFD."""
        detokenizer = IncrementalDetokenizer(self.text, keep_special_tokens=keep_special_tokens)
        return "".join([*map(detokenizer.push, ids), detokenizer.finish()])

    def token_bytes(self, token_id: int) -> bytes:
        """What the token contributes inside a text, special or not. Raises IndexError outside the vocabulary."""
        return self.text.data[token_id]
