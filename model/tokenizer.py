"""Loads the tokenizer of a model: from a Hugging Face folder, or from inside a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from google.protobuf.message import DecodeError
from tokenizers import AddedToken

from pagestream.model.chat_template import ChatTemplate
from pagestream.model.errors import ModelError, reading
from pagestream.model.tokenizer_base import MAX_TOKENS, Tokenizer
from pagestream.model.tokenizer_fast import FastTokenizer, surround
from pagestream.model.tokenizer_sentencepiece import ModelProto, SentencePieceTokenizer

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(path: Path) -> Tokenizer:
    """`path` is a GGUF file or a folder with tokenizer.json (preferred) or tokenizer.model and their companions.

    Raises ModelError if there is none or it is broken, UnsupportedModelError if its kind is not understood.
    """
    with reading(path):
        return _load_tokenizer(path)


def _load_tokenizer(path: Path) -> Tokenizer:
    if path.suffix == ".gguf":
        # here, because only GGUF files need the gguf package
        from pagestream.model.gguf_file import open_gguf  # noqa: PLC0415
        from pagestream.model.tokenizer_gguf import gguf_tokenizer  # noqa: PLC0415

        return gguf_tokenizer(open_gguf(path))
    config = _read_json(path / "special_tokens_map.json") | _read_json(path / "tokenizer_config.json")
    if (path / "tokenizer.json").is_file():
        return _from_tokenizer_json(path, config)
    if (path / "tokenizer.model").is_file():
        return _from_sentencepiece(path, config)
    raise ModelError(f"{path} has no tokenizer: neither tokenizer.json nor tokenizer.model is there")


def _from_tokenizer_json(folder: Path, config: dict[str, Any]) -> Tokenizer:
    file = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no narrower class
        raise ModelError(f"{file} cannot be read: {error}") from error
    known = backend.get_added_tokens_decoder()
    for index, token in _added_tokens(folder, config).items():
        if repr(token) != repr(known.get(index)):  # AddedToken compares by its content alone
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != index:
                raise ModelError(f"{folder}: added token {token.content!r} cannot have id {index} as its files say")
    names = _special_tokens(config)
    marked = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens(
        [name for name in names.values() if name not in marked and backend.token_to_id(name) is not None]
    )
    bos, eos = names.get("bos_token"), names.get("eos_token")
    bos_id, eos_id = (None if name is None else backend.token_to_id(name) for name in (bos, eos))
    if "add_bos_token" in config or "add_eos_token" in config:
        around = backend.encode("", add_special_tokens=True).ids
        surround(
            backend,
            bos if config.get("add_bos_token", bos_id in around) else None,
            eos if config.get("add_eos_token", eos_id in around) else None,
        )
    return FastTokenizer(
        backend,
        bos_token_id=bos_id,
        eos_token_ids=_end_tokens(folder, eos_id),
        chat_template=_chat_template(folder, config),
    )


def _from_sentencepiece(folder: Path, config: dict[str, Any]) -> Tokenizer:
    file = folder / "tokenizer.model"
    try:
        proto = ModelProto.FromString(file.read_bytes())
    except DecodeError as error:
        raise ModelError(f"{file} is not a SentencePiece model: {error}") from error
    added = _added_tokens(folder, config)
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    ids |= {token.content: index for index, token in added.items()}
    trained = {"bos_token": proto.trainer_spec.bos_piece, "eos_token": proto.trainer_spec.eos_piece}
    names = trained | _special_tokens(config)
    eos_id = ids.get(names["eos_token"])
    return SentencePieceTokenizer(
        proto,
        added,
        bos_token_id=ids.get(names["bos_token"]),
        eos_token_ids=_end_tokens(folder, eos_id),
        add_bos=config.get("add_bos_token", True),  # as the Llama family does where nothing is said
        add_eos=config.get("add_eos_token", False),
        chat_template=_chat_template(folder, config | names),
    )


def _read_json(file: Path) -> dict[str, Any]:
    """The object in the file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object")
    return content


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """By id, in order; the newer `added_tokens_decoder` has the flags that added_tokens.json lacks."""
    plain = {
        index: AddedToken(name, normalized=False) for name, index in _read_json(folder / "added_tokens.json").items()
    }
    flagged = {int(index): AddedToken(**fields) for index, fields in config.get("added_tokens_decoder", {}).items()}
    added = dict(sorted((plain | flagged).items()))
    for index in added:
        if not 0 <= index < MAX_TOKENS:
            raise ModelError(f"{folder}: {index} is no id of an added token")
    return added


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like, as templates name them; a token is a string or an object with `content`."""
    contents = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def _end_tokens(folder: Path, eos_id: int | None) -> list[int]:
    """The tokenizer's end token and those of generation_config.json, or of config.json where it names none."""
    listed = _read_json(folder / "generation_config.json").get("eos_token_id")
    if listed is None:
        listed = _read_json(folder / "config.json").get("eos_token_id")
    ids = listed if isinstance(listed, list) else [listed]
    return [index for index in (eos_id, *ids) if index is not None]


def _chat_template(folder: Path, config: dict[str, Any]) -> ChatTemplate | None:
    """From a file of its own, or from tokenizer_config.json: one template, or a list of named ones with a default."""
    file = folder / "chat_template.jinja"
    source: Any
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    else:
        source = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return None if source is None else ChatTemplate(source, _special_tokens(config))
