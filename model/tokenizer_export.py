"""A served tokenizer as the files that other programs read: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json

from pagestream.model.tokenizer_base import Tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """By name. Raises UnsupportedModelError if no tokenizer.json cuts every text as this tokenizer does."""
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.chat_template is not None:
        config |= {"chat_template": tokenizer.chat_template.source, **tokenizer.chat_template.special_tokens}
    named = {"bos_token": tokenizer.bos_token_id, "eos_token": next(iter(tokenizer.eos_token_ids), None)}
    config |= {name: tokenizer.token_bytes(index).decode() for name, index in named.items() if index is not None}
    return {"tokenizer.json": tokenizer.to_json().encode(), "tokenizer_config.json": json.dumps(config).encode()}
