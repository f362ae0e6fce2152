"""Tokenizers of the sentencepiece library: a tokenizer.model, or what was built from the vocabulary in a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken

from pagestream.model.chat_template import ChatTemplate
from pagestream.model.detokenizer import TokenText
from pagestream.model.errors import ModelError, UnsupportedModelError
from pagestream.model.tokenizer_base import Tokenizer
from pagestream.model.tokenizer_fast import surround

ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined] # protobuf makes it when imported
_Piece: Any = ModelProto.SentencePiece
_SPACE = "\u2581"  # stands for a space inside pieces


class SentencePieceTokenizer(Tokenizer):
    """Encodes with a sentencepiece model; decodes with the bytes of its pieces, as the library does.

    The library never takes text for a control piece, but chat templates write them out: text is split at control,
    unknown and added tokens, and each part between is encoded as a text of its own.
    """

    def __init__(
        self,
        proto: Any,  # a ModelProto
        added: Mapping[int, AddedToken],
        *,
        bos_token_id: int | None,
        eos_token_ids: Iterable[int],
        add_bos: bool,
        add_eos: bool,
        chat_template: ChatTemplate | None,
    ) -> None:
        """`added` are tokens beside or in place of the model's own. Raises ModelError for a model that the library
        does not load.
        """
        self._proto, self._added = proto, added
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(proto.SerializeToString())
        except RuntimeError as error:
            raise ModelError(f"the SentencePiece model cannot be loaded: {error}") from error
        eos = tuple(eos_token_ids)
        super().__init__(
            _token_text(proto, added), bos_token_id=bos_token_id, eos_token_ids=eos, chat_template=chat_template
        )
        self._before = [bos_token_id] if add_bos and bos_token_id is not None else []
        self._after = [eos[0]] if add_eos and eos else []
        written = {
            index: AddedToken(piece.piece, normalized=False)
            for index, piece in enumerate(proto.pieces)
            if piece.type in {_Piece.CONTROL, _Piece.UNKNOWN}
        } | dict(added)
        self._written = {index: token.content for index, token in written.items()}
        self._ids = {token.content: index for index, token in written.items()}
        longest_first = sorted(written.values(), key=lambda token: len(token.content), reverse=True)
        self._splitter = re.compile("(" + "|".join(map(_pattern, longest_first)) + ")")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = list(self._before) if add_special_tokens else []
        for place, part in enumerate(self._splitter.split(text)):
            if place % 2:  # a token with the white space that it swallows
                ids.append(self._ids[part] if part in self._ids else self._ids[part.strip()])
            else:
                ids += self._processor.encode(part)
        return ids + self._after if add_special_tokens else ids

    def to_json(self) -> str:
        # here, because only gateways ask for it
        from pagestream.model.sentencepiece_export import to_tokenizers  # noqa: PLC0415

        backend = to_tokenizers(self._proto, self._added)
        names = [[self._written[index] for index in ids] for ids in (self._before, self._after)]
        surround(backend, *(next(iter(side), None) for side in names))
        text: str = backend.to_str()
        return text


def _pattern(token: AddedToken) -> str:
    return (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")


def _token_text(proto: Any, added: Mapping[int, AddedToken]) -> TokenText:
    normalizer = proto.normalizer_spec
    if proto.denormalizer_spec.precompiled_charsmap or proto.trainer_spec.treat_whitespace_as_suffix:
        raise UnsupportedModelError(
            "a SentencePiece model with denormalizer_spec or treat_whitespace_as_suffix is not supported"
        )
    unknown = proto.trainer_spec.unk_surface.encode()
    data = [_piece_bytes(piece, unknown) for piece in proto.pieces]
    special = {index for index, piece in enumerate(proto.pieces) if piece.type == _Piece.CONTROL}
    first: dict[int, bytes] = {}
    if normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        plain = {_Piece.NORMAL, _Piece.USER_DEFINED, _Piece.UNUSED}
        for index, piece in enumerate(proto.pieces):
            if piece.type in plain and piece.piece.startswith(_SPACE):
                first[index] = data[index][1:]
    for index, token in added.items():
        data += [b""] * (index + 1 - len(data))
        data[index] = token.content.encode()
        first.pop(index, None)
        if token.special:
            special.add(index)
    return TokenText(
        tuple(data),
        frozenset(special),
        first,
        first_until_text=normalizer.remove_extra_whitespaces,
        replace_each_byte=True,
    )


def _piece_bytes(piece: Any, unknown: bytes) -> bytes:
    if piece.type == _Piece.BYTE:
        return bytes([int(piece.piece[3:5], 16)])  # <0x41>
    if piece.type == _Piece.UNKNOWN:
        return unknown
    text: str = piece.piece
    return text.encode() if piece.type == _Piece.CONTROL else text.replace(_SPACE, " ").encode()
