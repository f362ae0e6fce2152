# ruff: noqa: S106 - these tokens are no passwords
from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from transformers import PreTrainedTokenizerFast

from pagestream.model.errors import ModelError, UnsupportedModelError
from pagestream.model.tokenizer import Tokenizer, load_tokenizer

SAMPLES = [
    "Hello",
    " ",
    "  ",
    "\n\n",
    "▁",
    "naïve",
    "日本語",
    "👨‍👩‍👧",
    "e\u0301",
    "عالم",
    "हिन्दी",
    "3.14",
    "<s>",
    "</s>",
    "<unk>",
]
TEXT = st.lists(st.sampled_from(SAMPLES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)).map("".join)
STYLES = ["strip", "always", "first", "never"]


def save(folder: Path, backend: tokenizers.Tokenizer, **config: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["byte_level", *STYLES])
def json_pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    byte_level_backend: tokenizers.Tokenizer,
    byte_fallback_backend: Callable[[str], tokenizers.Tokenizer],
) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    backend = byte_level_backend if request.param == "byte_level" else byte_fallback_backend(request.param)
    path = save(tmp_path_factory.mktemp("model"), backend, bos_token="<s>", eos_token="</s>")
    oracle = PreTrainedTokenizerFast.from_pretrained(path, clean_up_tokenization_spaces=False)
    return load_tokenizer(path), oracle


@settings(deadline=None)
@given(TEXT, st.booleans())
def test_encodes_and_decodes_as_transformers(
    json_pair: tuple[Tokenizer, PreTrainedTokenizerFast], text: str, special: bool
) -> None:
    ours, oracle = json_pair
    ids = ours.encode(text, add_special_tokens=special)
    assert ids == oracle.encode(text, add_special_tokens=special)
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, keep_special_tokens=True) == oracle.decode(ids)


@settings(deadline=None)
@given(st.data())
def test_random_ids_decode_as_transformers(
    json_pair: tuple[Tokenizer, PreTrainedTokenizerFast], data: st.DataObject
) -> None:
    """Byte-fallback ids spell characters here, but not the mark for spaces; see FastTokenizer for why."""
    ours, oracle = json_pair
    fallback = {f"<0x{byte:02X}>" for byte in range(256)}
    token = st.integers(0, ours.vocab_size - 1)
    plain = token.filter(lambda index: oracle.convert_ids_to_tokens(index) not in fallback).map(lambda index: [index])
    character = st.characters(exclude_categories=["Cs"]).map(lambda text: oracle.encode(text)[-1:])
    by_bytes = st.characters(exclude_categories=["Cs"], exclude_characters="▁").map(
        lambda text: oracle.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])
    )
    whole = st.lists(plain | by_bytes) if "<0x00>" in oracle.get_vocab() else st.lists(plain | character)
    ids = [token for tokens in data.draw(whole) for token in tokens]
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, keep_special_tokens=True) == oracle.decode(ids)


def test_facts_of_a_tokenizer_json(json_pair: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    ours, oracle = json_pair
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_ids) == (len(oracle), 1, (2,))
    assert ours.special_token_ids == {0, 1, 2}
    assert ours.token_bytes(2) == b"</s>"
    assert ours.chat_template is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.integers(0, 255), max_size=8))
def test_a_broken_run_of_bytes_keeps_its_valid_characters(
    byte_fallback_backend: Callable[[str], tokenizers.Tokenizer], tmp_path: Path, run: list[int]
) -> None:
    """The library replaces every byte of such a run; streamed text cannot take characters back."""
    backend = byte_fallback_backend("strip")
    ours = load_tokenizer(save(tmp_path, backend))
    ids = [backend.token_to_id("<s>"), *(backend.token_to_id(f"<0x{byte:02X}>") for byte in [65, *run])]
    library = backend.decode(ids)
    if "\ufffd" in library:
        escaped = bytes([65, *run]).decode("utf-8", "surrogateescape")
        library = re.sub("[\udc80-\udcff]", "\ufffd", escaped)
    assert ours.decode(ids) == library


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [1, 9, 9]),
        ({"add_bos_token": False}, [9, 9]),
        ({"add_eos_token": True}, [1, 9, 9, 2]),
        ({"add_bos_token": False, "add_eos_token": True}, [9, 9, 2]),
    ],
)
def test_what_is_put_around_a_text(tmp_path: Path, config: dict[str, bool], expected: list[int]) -> None:
    """tokenizer.json says it, tokenizer_config.json may overrule it."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(97 + i): 3 + i for i in range(8)}}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ours = load_tokenizer(save(tmp_path, backend, bos_token="<s>", eos_token={"content": "</s>"}, **config))
    assert ours.encode("gg", add_special_tokens=True) == expected
    assert ours.encode("gg", add_special_tokens=False) == [9, 9]


def test_truncation_and_padding_of_the_training_are_off(
    byte_level_backend: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level_backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    text = "one two three four five"
    ids = load_tokenizer(save(tmp_path, backend)).encode(text, add_special_tokens=True)
    assert ids == byte_level_backend.encode(text).ids


def test_added_tokens_of_the_config(byte_level_backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    size = byte_level_backend.get_vocab_size()
    token = AddedToken("<|im end|>", normalized=False, special=True)
    fields = {
        name: getattr(token, name) for name in ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    }
    path = save(tmp_path, byte_level_backend, added_tokens_decoder={str(size): fields}, eos_token="<|im end|>")
    ours, oracle = load_tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    ids = ours.encode("a<|im end|>b", add_special_tokens=False)
    assert ids == oracle.encode("a<|im end|>b")
    assert (ours.decode(ids), ours.decode(ids, keep_special_tokens=True)) == ("ab", "a<|im end|>b")
    assert ours.eos_token_ids == (size,)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {str(size + 7): fields}}))
    with pytest.raises(ModelError, match=f"cannot have id {size + 7}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [(None, None, (2,)), ([5, 2], 9, (2, 5)), (None, 9, (2, 9)), (7, None, (2, 7))],
)
def test_end_tokens(
    byte_level_backend: tokenizers.Tokenizer,
    tmp_path: Path,
    generation: object,
    model: object,
    expected: tuple[int, ...],
) -> None:
    path = save(tmp_path, byte_level_backend, eos_token="</s>")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (path / "config.json").write_text(json.dumps({"eos_token_id": model}))
    assert load_tokenizer(path).eos_token_ids == expected


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"eos_token": "</s>", "chat_template": "{{ messages[0].content }}{{ eos_token }}"}},
        {
            "special_tokens_map.json": {"eos_token": {"content": "</s>"}},
            "tokenizer_config.json": {
                "chat_template": [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": "{{ messages[0].content }}{{ eos_token }}"},
                ]
            },
        },
        {
            "tokenizer_config.json": {"eos_token": "</s>"},
            "chat_template.jinja": "{{ messages[0].content }}{{ eos_token }}",
        },
        {
            "tokenizer_config.json": {"eos_token": "</s>"},
            "chat_template.json": {"chat_template": "{{ messages[0].content }}{{ eos_token }}"},
        },
    ],
    ids=["string", "named", "jinja", "json"],
)
def test_where_a_chat_template_may_be(
    byte_level_backend: tokenizers.Tokenizer, tmp_path: Path, files: dict[str, object]
) -> None:
    path = save(tmp_path, byte_level_backend)
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    template = load_tokenizer(path).chat_template
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}], add_generation_prompt=False) == "hi</s>"


def test_encoding_from_many_threads(byte_level_backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    ours = load_tokenizer(save(tmp_path, byte_level_backend))
    texts = [f"text number {n} naïve 日本語 " * 50 for n in range(64)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda text: ours.encode(text, add_special_tokens=False), texts))
    assert [ours.decode(tokens) for tokens in ids] == texts


def broken_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def broken_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"not a model")


def broken_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (Path.exists, "has no tokenizer: neither tokenizer.json nor tokenizer.model"),
        (broken_json, "tokenizer.json cannot be read"),
        (broken_sentencepiece, "tokenizer.model is not a SentencePiece model"),
        (broken_config, "tokenizer_config.json is not JSON"),
    ],
)
def test_one_sentence_for_what_is_missing_or_broken(
    tmp_path: Path, prepare: Callable[[Path], None], message: str
) -> None:
    prepare(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 1)]), "ByteLevel"),
        (decoders.Strip(" ", 0, 1), "Strip"),
        (None, "without a decoder"),
    ],
)
def test_decoders_that_cannot_stream_are_refused_by_name(
    byte_level_backend: tokenizers.Tokenizer, tmp_path: Path, decoder: decoders.Decoder | None, message: str
) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level_backend.to_str())
    backend.decoder = decoder
    with pytest.raises(UnsupportedModelError, match=message):
        load_tokenizer(save(tmp_path, backend))
