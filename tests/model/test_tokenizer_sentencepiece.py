# ruff: noqa: S106 - these tokens are no passwords
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from pagestream.model.detokenizer import IncrementalDetokenizer
from pagestream.model.errors import UnsupportedModelError
from pagestream.model.tokenizer import Tokenizer, load_tokenizer

SAMPLES = ["Hello", " ", "  ", "\n\n", "▁", "naïve", "日本語", "👨‍👩‍👧", "e\u0301", "عالم", "हिन्दी", "3.14", "</s>"]
TEXT = st.lists(st.sampled_from(SAMPLES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)).map("".join)


def save_sentencepiece(folder: Path, model: bytes, **config: object) -> Path:
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(
    scope="module",
    params=[
        {"model_type": "bpe", "remove_extra_whitespaces": False},
        {"model_type": "bpe", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"model_type": "unigram", "user_defined_symbols": ["<tool>", "▁▁"]},
        {"model_type": "unigram", "byte_fallback": False, "normalization_rule_name": "nmt_nfkc"},
    ],
    ids=["llama", "no_prefix", "unigram", "no_bytes"],
)
def spm_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Callable[..., bytes]
) -> tuple[Tokenizer, SentencePieceProcessor]:
    model = sentencepiece_model(**request.param)
    return load_tokenizer(save_sentencepiece(tmp_path_factory.mktemp("model"), model)), SentencePieceProcessor(
        model_proto=model
    )


@settings(deadline=None)
@given(text=TEXT)
def test_encodes_and_decodes_as_sentencepiece(spm_pair: tuple[Tokenizer, SentencePieceProcessor], text: str) -> None:
    ours, oracle = spm_pair
    text = re.sub("<s>|</s>|<unk>", "", text)
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == oracle.encode(text)
    assert ours.decode(ids) == oracle.decode(ids)
    assert ours.encode(text, add_special_tokens=True) == [oracle.bos_id(), *ids]


@settings(deadline=None)
@given(data=st.data())
def test_random_ids_decode_as_sentencepiece(
    spm_pair: tuple[Tokenizer, SentencePieceProcessor], data: st.DataObject
) -> None:
    """Byte pieces in any order; each invalid byte is one U+FFFD. Control pieces only in front: between the bytes
    of one character the library lets them break it.
    """
    ours, oracle = spm_pair
    token = st.integers(0, ours.vocab_size - 1)
    bytes_only = st.integers(3, min(258, ours.vocab_size - 1))
    space = st.sampled_from([oracle.piece_to_id(piece) for piece in ("▁", "▁▁", "▁the")])
    plain = (token | bytes_only | space).filter(lambda index: not oracle.is_control(index))
    ids = [oracle.bos_id()] * data.draw(st.integers(0, 2)) + data.draw(st.lists(plain))
    assert ours.decode(ids) == oracle.decode(ids)


def test_special_tokens_in_text_become_themselves(
    spm_pair: tuple[Tokenizer, SentencePieceProcessor],
) -> None:
    ours, oracle = spm_pair
    expected = [1, *oracle.encode("Hello"), 2, *oracle.encode("the quick")]
    ids = ours.encode("<s>Hello</s>the quick", add_special_tokens=False)
    assert ids == expected
    assert ours.decode(ids, keep_special_tokens=True).startswith("<s>")
    assert "<s>" not in ours.decode(ids)


def test_added_tokens(tmp_path: Path, sentencepiece_model: Callable[..., bytes]) -> None:
    """Beside the model's own pieces, with the white space that they swallow."""
    model = sentencepiece_model(model_type="bpe", remove_extra_whitespaces=False)
    oracle = SentencePieceProcessor(model_proto=model)
    size = oracle.get_piece_size()
    flags = {"single_word": False, "normalized": False}
    added = {
        str(size): {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": True, **flags},
        str(size + 2): {"content": "<tool>", "special": False, "lstrip": True, "rstrip": False, **flags},
    }
    path = save_sentencepiece(tmp_path, model, added_tokens_decoder=added, eos_token="<|end|>", add_eos_token=True)
    ours = load_tokenizer(path)
    assert ours.encode("a  <tool>b<|end|>\n\nc", add_special_tokens=True) == [
        *(1, *oracle.encode("a"), size + 2, *oracle.encode("b"), size, *oracle.encode("c"), size)
    ]
    assert (ours.eos_token_ids, ours.vocab_size) == ((size,), size + 3)
    assert ours.decode([size, size + 1, size + 2]) == "<tool>"


def test_a_model_with_spaces_behind_words_is_refused(tmp_path: Path, sentencepiece_model: Callable[..., bytes]) -> None:
    model = sentencepiece_model(model_type="bpe", treat_whitespace_as_suffix=True)
    with pytest.raises(UnsupportedModelError, match="treat_whitespace_as_suffix is not supported"):
        load_tokenizer(save_sentencepiece(tmp_path, model))


@settings(deadline=None)
@given(
    text=st.lists(st.sampled_from(["Hello", "the quick", "naïve", "fox,", "3.14"]), min_size=2).map(" ".join),
    data=st.data(),
)
def test_an_answer_that_continues_a_prompt_keeps_its_space(
    spm_pair: tuple[Tokenizer, SentencePieceProcessor], text: str, data: st.DataObject
) -> None:
    """Cut anywhere, the prompt's text and the answer's are together the text of all tokens."""
    ours, oracle = spm_pair
    ids = oracle.encode(text)
    cut = data.draw(st.integers(1, len(ids)))
    prompt = IncrementalDetokenizer(ours.text)
    answer = IncrementalDetokenizer(ours.text, continues_text=True)
    pieces = [*map(prompt.push, ids[:cut]), *map(answer.push, ids[cut:])]
    assert "".join(pieces) == oracle.decode(ids)
