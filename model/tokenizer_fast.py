"""Tokenizers of the `tokenizers` library: a tokenizer.json, or what was built from the vocabulary in a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import processors

from pagestream.model.chat_template import ChatTemplate
from pagestream.model.detokenizer import TokenText
from pagestream.model.errors import ModelError, UnsupportedModelError
from pagestream.model.tokenizer_base import MAX_TOKENS, Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class FastTokenizer(Tokenizer):
    """Encodes with a tokenizers object; decodes with the bytes of its tokens.

    Decoding equals the library's own, but for two rare cases of byte-fallback tokens. Within a run of them that is not
    UTF-8 as a whole the library replaces every byte, here the valid characters of the run stay: what is wrong further
    on cannot be known when the first characters are streamed. And a run that spells the mark for spaces, U+2581,
    stays that character, where a decoder that replaces marks after joining bytes would make it a space.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        eos_token_ids: Iterable[int],
        chat_template: ChatTemplate | None,
    ) -> None:
        """Raises UnsupportedModelError if the decoder is not one that gives each token its own bytes."""
        backend.no_truncation()  # a tokenizer.json may still carry those of its training
        backend.no_padding()
        self._backend = backend
        super().__init__(
            _token_text(backend), bos_token_id=bos_token_id, eos_token_ids=eos_token_ids, chat_template=chat_template
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # As a batch of one, because the library's `encode` keeps the interpreter lock: 5 MB would stop every thread.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def to_json(self) -> str:
        text: str = self._backend.to_str()
        return text


def surround(backend: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Makes `encode` put these special tokens around a text, in place of whatever it put there."""
    leading, trailing = ([] if name is None else [name] for name in (before, after))
    backend.post_processor = processors.TemplateProcessing(
        single=[*leading, "$A", *trailing],
        special_tokens=[(name, backend.token_to_id(name)) for name in dict.fromkeys(leading + trailing)],
    )


def _token_text(backend: tokenizers.Tokenizer) -> TokenText:
    added = backend.get_added_tokens_decoder()
    tokens = {index: token for token, index in backend.get_vocab(with_added_tokens=True).items()}
    tokens |= {index: token.content for index, token in added.items()}
    special = frozenset(index for index, token in added.items() if token.special)
    steps = _decoder_steps(backend)
    kinds = [step["type"] for step in steps if step["type"] != "Fuse"]
    if kinds == ["ByteLevel"]:
        byte_of = _byte_level_alphabet()
        return TokenText(_table({index: _byte_level_bytes(token, byte_of) for index, token in tokens.items()}), special)
    _check_steps(steps)
    data, first = _ask_decoder(backend.decoder, tokens, byte_fallback="ByteFallback" in kinds)
    return TokenText(_table(data), special, first, replace_each_byte=True)


def _table(data: dict[int, bytes]) -> tuple[bytes, ...]:
    size = max(data, default=-1) + 1
    if size > MAX_TOKENS:
        raise ModelError(f"{size - 1} is no id of a token: at most {MAX_TOKENS} are supported")
    return tuple(data.get(index, b"") for index in range(size))


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        raise UnsupportedModelError("a tokenizer without a decoder is not supported: it joins tokens with spaces")
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _check_steps(steps: list[dict[str, Any]]) -> None:
    """With these steps the text is that of the first token, then what every other token contributes by itself."""
    for step in steps:
        match step:
            case {"type": "ByteFallback" | "Fuse" | "Metaspace"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(pattern)}} if len(pattern) == 1:
                pass
            case {"type": "Strip", "start": 0 | 1, "stop": 0}:
                pass
            case _:
                raise UnsupportedModelError(
                    f"the tokenizer's decoder step {json.dumps(step)} is not supported: its text cannot be streamed"
                )


def _ask_decoder(decoder: Any, tokens: dict[int, str], *, byte_fallback: bool) -> tuple[dict[int, bytes], ...]:
    """The bytes of each token inside a text, and as its first token where that differs; from the decoder itself."""
    data: dict[int, bytes] = {}
    first: dict[int, bytes] = {}
    for index, token in tokens.items():
        byte = _BYTE_TOKEN.fullmatch(token) if byte_fallback else None
        if byte is not None and (value := int(byte[1], 16)) >= 0x80:  # part of a character
            data[index] = bytes([value])
            continue
        data[index] = decoder.decode(["a", token])[1:].encode()
        if (alone := decoder.decode([token]).encode()) != data[index]:
            first[index] = alone
    return data, first


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: Latin-1 characters that print stand for themselves, the other bytes in
    order for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _byte_level_bytes(token: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:  # an added token in plain text
        return token.encode()
