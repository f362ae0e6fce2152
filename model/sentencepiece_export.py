"""A SentencePiece model as an object of the `tokenizers` library, so that gateways that know tokenizer.json alone cut
text as we do. Models whose ids could differ are refused: README.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers

from pagestream.model.errors import UnsupportedModelError

ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined] # protobuf makes it when imported
_Piece: Any = ModelProto.SentencePiece
_SPACE = "\u2581"


def to_tokenizers(proto: Any, added: Mapping[int, AddedToken]) -> tokenizers.Tokenizer:
    """`added` are tokens beside or in place of the model's own. Raises UnsupportedModelError for a model of which the
    library makes other ids for some texts.
    """
    _refuse_inexact(proto)
    backend = tokenizers.Tokenizer(_bpe(proto))
    backend.normalizer = _normalizer(proto)
    backend.decoder = _decoder(proto)
    own = {
        index: AddedToken(piece.piece, normalized=False, special=piece.type == _Piece.CONTROL)
        for index, piece in enumerate(proto.pieces)
        if piece.type in {_Piece.CONTROL, _Piece.UNKNOWN, _Piece.USER_DEFINED}
    }
    for token in dict(sorted((own | dict(added)).items())).values():
        backend.add_tokens([token])
    return backend


def _refuse_inexact(proto: Any) -> None:
    trained, rules = proto.trainer_spec, proto.normalizer_spec
    defined = [piece.piece for piece in proto.pieces if piece.type == _Piece.USER_DEFINED]
    reasons = {
        "is not BPE": trained.model_type != trained.BPE,
        "normalises characters": bool(rules.precompiled_charsmap),
        "removes spaces": rules.remove_extra_whitespaces,
        "has symbols of its own beside a space before each text": bool(defined) and rules.add_dummy_prefix,
        "has symbols of its own with spaces": any(_SPACE in symbol for symbol in defined),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModelError(f"this SentencePiece model has no exact tokenizer.json: it {reason}")


def _bpe(proto: Any) -> models.BPE:
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _Piece.UNKNOWN)
    return models.BPE(
        {piece.piece: index for index, piece in enumerate(proto.pieces)},
        list(_merges(proto)),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _merges(proto: Any) -> Iterable[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union has the highest score; here every pair has a rank. Every way to
    cut a piece in two gets one, beside those of pieces with its score."""
    mergeable = {
        piece.piece: (-piece.score, index) for index, piece in enumerate(proto.pieces) if piece.type == _Piece.NORMAL
    }
    for piece in sorted(mergeable, key=lambda name: mergeable[name]):
        for cut in range(1, len(piece)):
            if piece[:cut] in mergeable and piece[cut:] in mergeable:
                yield piece[:cut], piece[cut:]


def _normalizer(proto: Any) -> normalizers.Normalizer:
    spaces = normalizers.Replace(" ", _SPACE)
    if not proto.normalizer_spec.add_dummy_prefix:
        return spaces
    return normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])


def _decoder(proto: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
