"""The tokenizer inside a GGUF file, made into an object of the library that the vocabulary was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from gguf import GGUFReader, Keys, TokenType
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from pagestream.model.chat_template import ChatTemplate
from pagestream.model.errors import ModelError, UnsupportedModelError
from pagestream.model.tokenizer_base import Tokenizer
from pagestream.model.tokenizer_fast import FastTokenizer, surround
from pagestream.model.tokenizer_sentencepiece import ModelProto, SentencePieceTokenizer

# How models cut text into words before merging bytes: the patterns of their own tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _WordRules:
    """What `tokenizer.ggml.pre` stands for: the file names it, and leaves the rest to the reader."""

    split: str | None = None  # None: the pattern of GPT-2
    single_digits: bool = False
    ignore_merges: bool = False  # a word that is a token needs no merges
    compose: bool = False  # Unicode NFC
    add_bos: bool = False  # where the file does not say


_WORD_RULES = {
    "gpt-2": _WordRules(),
    "smollm": _WordRules(single_digits=True),
    "llama-bpe": _WordRules(_LLAMA3, ignore_merges=True, add_bos=True),
    "qwen2": _WordRules(_QWEN2, compose=True),
    "tekken": _WordRules(_TEKKEN, ignore_merges=True, add_bos=True),
}


def gguf_tokenizer(reader: GGUFReader) -> Tokenizer:
    """Raises UnsupportedModelError naming the kind of vocabulary, ModelError if there is none or it is broken."""
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    kind = fields.get(Keys.Tokenizer.MODEL)
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}
    if kind is None:
        raise ModelError(f"the GGUF file has no tokenizer ({Keys.Tokenizer.MODEL} is missing)")
    if kind not in builders:
        raise UnsupportedModelError(
            f"{Keys.Tokenizer.MODEL} = {kind!r} is not supported: 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece) are"
        )
    tokens, types = fields.get(Keys.Tokenizer.LIST), fields.get(Keys.Tokenizer.TOKEN_TYPE)
    if not tokens or not types or len(tokens) != len(types):
        raise ModelError(
            f"the GGUF file's vocabulary is incomplete: {Keys.Tokenizer.LIST} has {len(tokens or ())} entries and "
            f"{Keys.Tokenizer.TOKEN_TYPE} {len(types or ())}"
        )
    return builders[kind](fields)


def _byte_level_bpe(fields: Mapping[str, Any]) -> Tokenizer:
    name = fields.get(Keys.Tokenizer.PRE)
    if name not in _WORD_RULES:
        raise UnsupportedModelError(
            f"{Keys.Tokenizer.PRE} = {name!r} is not supported: {', '.join(_WORD_RULES)} are; the model's Hugging Face "
            "folder carries the full rules in its tokenizer.json"
        )
    rules, tokens = _WORD_RULES[name], fields[Keys.Tokenizer.LIST]
    backend = tokenizers.Tokenizer(_merging_model(fields, rules))
    if rules.compose:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(rules)
    backend.decoder = decoders.ByteLevel()
    written_whole = {TokenType.CONTROL, TokenType.USER_DEFINED}
    backend.add_tokens(
        [
            AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
            for token, kind in zip(tokens, fields[Keys.Tokenizer.TOKEN_TYPE], strict=True)
            if kind in written_whole
        ]
    )
    bos, eos = fields.get(Keys.Tokenizer.BOS_ID), fields.get(Keys.Tokenizer.EOS_ID)
    surround(
        backend,
        tokens[bos] if bos is not None and fields.get(Keys.Tokenizer.ADD_BOS, rules.add_bos) else None,
        tokens[eos] if eos is not None and fields.get(Keys.Tokenizer.ADD_EOS, False) else None,
    )
    return FastTokenizer(backend, bos_token_id=bos, eos_token_ids=_end_tokens(fields), chat_template=_template(fields))


def _merging_model(fields: Mapping[str, Any], rules: _WordRules) -> models.BPE:
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get(Keys.Tokenizer.MERGES, [])]
    vocabulary = {token: index for index, token in enumerate(fields[Keys.Tokenizer.LIST])}
    try:
        return models.BPE(vocabulary, merges, ignore_merges=rules.ignore_merges)
    except Exception as error:  # the library has no narrower class
        raise ModelError(f"the GGUF file's vocabulary does not fit its merges: {error}") from error


def _pre_tokenizer(rules: _WordRules) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.split is None)
    if rules.split is not None:
        split = pre_tokenizers.Split(tokenizers.Regex(rules.split), "isolated")
        return pre_tokenizers.Sequence([split, byte_level])
    if rules.single_digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _sentencepiece(fields: Mapping[str, Any]) -> Tokenizer:
    """GGUF numbers the types of pieces as SentencePiece does, and its `llama` vocabularies are of the BPE kind."""
    tokens, types = fields[Keys.Tokenizer.LIST], fields[Keys.Tokenizer.TOKEN_TYPE]
    scores = fields.get(Keys.Tokenizer.SCORES, [])
    if len(scores) != len(tokens):
        raise ModelError(f"{Keys.Tokenizer.SCORES} has {len(scores)} entries for {len(tokens)} tokens")
    proto = ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        # converters write spaces into user-defined pieces; sentencepiece looks for its own mark
        piece = token.replace(" ", "\u2581") if kind == TokenType.USER_DEFINED else token
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = TokenType.BYTE in types
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = fields.get(Keys.Tokenizer.ADD_PREFIX, True)
    normalizer.remove_extra_whitespaces = fields.get(Keys.Tokenizer.REMOVE_EXTRA_WS, False)
    normalizer.precompiled_charsmap = bytes(bytearray(fields.get(Keys.Tokenizer.PRECOMPILED_CHARSMAP, [])))
    return SentencePieceTokenizer(
        proto,
        added={},
        bos_token_id=fields.get(Keys.Tokenizer.BOS_ID),
        eos_token_ids=_end_tokens(fields),
        add_bos=fields.get(Keys.Tokenizer.ADD_BOS, True),
        add_eos=fields.get(Keys.Tokenizer.ADD_EOS, False),
        chat_template=_template(fields),
    )


def _end_tokens(fields: Mapping[str, Any]) -> list[int]:
    ids = [fields.get(key) for key in (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)]
    return [index for index in ids if index is not None]


def _template(fields: Mapping[str, Any]) -> ChatTemplate | None:
    source = fields.get(Keys.Tokenizer.CHAT_TEMPLATE)
    if source is None:
        return None
    tokens = fields[Keys.Tokenizer.LIST]
    named = {
        "bos_token": Keys.Tokenizer.BOS_ID,
        "eos_token": Keys.Tokenizer.EOS_ID,
        "unk_token": Keys.Tokenizer.UNK_ID,
        "pad_token": Keys.Tokenizer.PAD_ID,
    }
    ids = {name: fields.get(key) for name, key in named.items()}
    return ChatTemplate(source, {name: tokens[index] for name, index in ids.items() if index is not None})
