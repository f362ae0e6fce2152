from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from gguf import GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from pagestream.model.errors import ModelError, UnsupportedModelError
from pagestream.model.tokenizer import Tokenizer, load_tokenizer

SAMPLES = [
    "Hello",
    " ",
    "  ",
    "\n\n",
    " \t\r\n",
    "I'LL",
    "don't",
    "naïve",
    "日本語",
    "👨‍👩‍👧",
    "e\u0301",
    "हिन्दी",
    "12345",
    "½Ⅷ٣",
    "</s>",
]
TEXT = st.lists(st.sampled_from(SAMPLES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)).map("".join)


def write(path: Path, fill: Callable[[GGUFWriter], None]) -> Path:
    """A GGUF file without tensors; `fill` adds the tokenizer's keys."""
    writer = GGUFWriter(path, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_keys(backend: tokenizers.Tokenizer, pre: str) -> Callable[[GGUFWriter], None]:
    state = json.loads(backend.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)

    def fill(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        kinds = {0: TokenType.CONTROL, 1: TokenType.CONTROL, 2: TokenType.CONTROL}
        writer.add_token_types([kinds.get(index, TokenType.NORMAL) for index in range(len(tokens))])
        writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    return fill


def sentencepiece_keys(model: bytes) -> Callable[[GGUFWriter], None]:
    """What llama.cpp's converter writes for a SentencePiece model."""
    proto = ModelProto.FromString(model)

    def fill(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        pieces = [
            piece.piece.replace("▁", " ") if piece.type == TokenType.USER_DEFINED else piece.piece
            for piece in proto.pieces
        ]
        writer.add_token_list(pieces)
        writer.add_token_scores([piece.score for piece in proto.pieces])
        writer.add_token_types([piece.type for piece in proto.pieces])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
        writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)
        if proto.normalizer_spec.precompiled_charsmap:
            writer.add_precompiled_charsmap(proto.normalizer_spec.precompiled_charsmap)

    return fill


@pytest.fixture(scope="module")
def default_pair(default_model_path: Path) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """The oracle: transformers forgets SmolLM's splitting of digits when it reads a GGUF file, so that is put right."""
    oracle = AutoTokenizer.from_pretrained(default_model_path.parent, gguf_file=default_model_path.name)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    return load_tokenizer(default_model_path), oracle


@settings(deadline=None)
@given(TEXT | st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "user\n", "7 times 8"])).map("".join))
def test_default_model_encodes_and_decodes_as_transformers(
    default_pair: tuple[Tokenizer, PreTrainedTokenizerFast], text: str
) -> None:
    ours, oracle = default_pair
    ids = ours.encode(text, add_special_tokens=True)
    assert ids == oracle.encode(text, add_special_tokens=False)  # the file says: no start token
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, keep_special_tokens=True) == oracle.decode(ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, 49151) | st.integers(0, 300)))
def test_default_model_decodes_random_ids_as_transformers(
    default_pair: tuple[Tokenizer, PreTrainedTokenizerFast], ids: list[int]
) -> None:
    ours, oracle = default_pair
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, keep_special_tokens=True) == oracle.decode(ids)


def test_facts_of_the_default_model(default_pair: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    """The 17 special tokens and the ids are those of SmolLM2-135M-Instruct's own tokenizer.json."""
    ours, _ = default_pair
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_ids) == (49152, 1, (2,))
    assert ours.special_token_ids == frozenset(range(17))
    assert ours.token_bytes(2) == b"<|im_end|>"
    assert ours.encode("<|im_start|>12 is twelve<|im_end|>", add_special_tokens=False)[:3] == [1, 33, 34]
    assert ours.chat_template is not None


@pytest.mark.parametrize("roles", [["user"], ["system", "user"], ["user", "assistant", "user"]])
@pytest.mark.parametrize("prompt", [True, False])
def test_default_model_renders_chats_as_transformers(
    default_pair: tuple[Tokenizer, PreTrainedTokenizerFast], roles: list[str], prompt: bool
) -> None:
    ours, oracle = default_pair
    chat = [{"role": role, "content": f" <b>{role}</b>\n{{{{ 1 }}}} é "} for role in roles]
    assert ours.chat_template is not None
    expected = oracle.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
    assert ours.chat_template.render(chat, add_generation_prompt=prompt) == expected


@pytest.fixture(scope="module", params=["gpt-2", "llama-bpe", "qwen2", "tekken"])
def pre_pair(
    request: pytest.FixtureRequest, byte_level_backend: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """For Qwen the class of the model is the oracle: from a GGUF file transformers forgets that Qwen composes (NFC)."""
    path = write(tmp_path_factory.mktemp("gguf") / "m.gguf", byte_level_keys(byte_level_backend, request.param))
    if request.param == "qwen2":
        model = json.loads(byte_level_backend.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        return load_tokenizer(path), Qwen2Tokenizer(
            model["vocab"], merges, extra_special_tokens=["<unk>", "<s>", "</s>"]
        )
    return load_tokenizer(path), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@settings(deadline=None)
@given(text=TEXT)
def test_word_rules_are_those_of_transformers(pre_pair: tuple[Tokenizer, PreTrainedTokenizerFast], text: str) -> None:
    ours, oracle = pre_pair
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == oracle.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("pre", "keys", "expected"),
    [
        ("gpt-2", {}, []),
        ("llama-bpe", {}, [1]),
        ("llama-bpe", {"bos": False}, []),
        ("qwen2", {"bos": True}, [1]),
        ("gpt-2", {"eos": True}, [2]),
    ],
)
def test_start_and_end_tokens(
    byte_level_backend: tokenizers.Tokenizer, tmp_path: Path, pre: str, keys: dict[str, bool], expected: list[int]
) -> None:
    """As the file says; where it does not, as models with these word rules are trained."""

    def fill(writer: GGUFWriter) -> None:
        byte_level_keys(byte_level_backend, pre)(writer)
        if "bos" in keys:
            writer.add_add_bos_token(keys["bos"])
        if "eos" in keys:
            writer.add_add_eos_token(keys["eos"])

    ours = load_tokenizer(write(tmp_path / "m.gguf", fill))
    assert ours.encode("", add_special_tokens=True) == expected
    assert ours.encode("", add_special_tokens=False) == []


def test_more_end_tokens_and_the_template(byte_level_backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    def fill(writer: GGUFWriter) -> None:
        byte_level_keys(byte_level_backend, "gpt-2")(writer)
        writer.add_eot_token_id(0)
        writer.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")

    ours = load_tokenizer(write(tmp_path / "m.gguf", fill))
    assert ours.eos_token_ids == (2, 0)
    assert ours.chat_template is not None
    text = ours.chat_template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert text == "<s>hi</s>"
    ids = ours.encode(text, add_special_tokens=False)
    assert (ids[0], ids[-1]) == (1, 2)


@pytest.fixture(
    scope="module",
    params=[
        {"remove_extra_whitespaces": False},
        {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
        {"remove_extra_whitespaces": False, "user_defined_symbols": ["<tool>", "▁▁"]},
        {"normalization_rule_name": "nmt_nfkc"},
    ],
    ids=["llama", "no_prefix", "user_defined", "normalised"],
)
def spm_pair(
    request: pytest.FixtureRequest,
    sentencepiece_model: Callable[..., bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tokenizer, SentencePieceProcessor]:
    model = sentencepiece_model(model_type="bpe", **request.param)
    path = write(tmp_path_factory.mktemp("gguf") / "m.gguf", sentencepiece_keys(model))
    return load_tokenizer(path), SentencePieceProcessor(model_proto=model)


@settings(deadline=None)
@given(text=TEXT)
def test_llama_vocabulary_is_the_sentencepiece_model_it_was_made_from(
    spm_pair: tuple[Tokenizer, SentencePieceProcessor], text: str
) -> None:
    ours, oracle = spm_pair
    text = re.sub("</s>", "<tool>  x", text)
    ids = ours.encode(text, add_special_tokens=True)
    assert ids == [1, *oracle.encode(text)]
    assert ours.decode(ids) == oracle.decode(ids)


@settings(deadline=None)
@given(ids=st.lists(st.integers(3, 400) | st.integers(3, 258)))
def test_llama_vocabulary_decodes_random_ids(
    spm_pair: tuple[Tokenizer, SentencePieceProcessor], ids: list[int]
) -> None:
    ours, oracle = spm_pair
    assert ours.decode(ids) == oracle.decode(ids)


def unknown_pre(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("starfleet")
    writer.add_token_list(["a"])
    writer.add_token_types([1])


def no_scores(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a"])
    writer.add_token_types([1])


def no_unknown_piece(writer: GGUFWriter) -> None:
    no_scores(writer)
    writer.add_token_scores([0.0])


def wrong_merges(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a"])
    writer.add_token_types([1])
    writer.add_token_merges(["a b"])


@pytest.mark.parametrize(
    ("fill", "error", "message"),
    [
        (
            lambda writer: writer.add_tokenizer_model("bert"),
            UnsupportedModelError,
            "tokenizer.ggml.model = 'bert' is not supported",
        ),
        (unknown_pre, UnsupportedModelError, "tokenizer.ggml.pre = 'starfleet' is not supported"),
        (lambda _: None, ModelError, "has no tokenizer"),
        (lambda writer: writer.add_tokenizer_model("llama"), ModelError, "vocabulary is incomplete"),
        (no_scores, ModelError, "tokenizer.ggml.scores has 0 entries for 1 tokens"),
        (no_unknown_piece, ModelError, "SentencePiece model cannot be loaded"),
        (wrong_merges, ModelError, "does not fit its merges"),
    ],
)
def test_refused_by_name(
    tmp_path: Path, fill: Callable[[GGUFWriter], None], error: type[ModelError], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        load_tokenizer(write(tmp_path / "m.gguf", fill))
