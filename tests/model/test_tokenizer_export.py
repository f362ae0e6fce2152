"""Exported tokenizers cut every text as the tokenizer they came from: 100,000 strings of all scripts, 0 differences."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
import transformers

from pagestream.model.errors import UnsupportedModelError
from pagestream.model.tokenizer import Tokenizer, load_tokenizer
from pagestream.model.tokenizer_export import tokenizer_files

STRINGS = 34_000  # of each of three models
WORDS = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "hello",
    "<|im_end|>",
    "\u2581x",
    "the",
    "  ",
    "\t",
    "\n",
    "\u3000",
    "\u2581",
]
BLOCKS = [(0, 0x1F), (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x4FF), (0x5D0, 0x5EA), (0x600, 0x6FF)]
BLOCKS += [(0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F), (0x2460, 0x24FF), (0x3040, 0x30FF)]
BLOCKS += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFF00, 0xFFFF), (0x1F300, 0x1F6FF), (0x10000, 0x10FFFF)]


def strings(count: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    text = json.dumps(tokenizers.__doc__) + (Path(transformers.__file__).read_text() * 2)[:200_000]
    for _ in range(count):
        kind = rng.random()
        if kind < 0.3:
            start = rng.randrange(len(text) - 80)
            yield text[start : start + rng.randint(0, 80)]
        elif kind < 0.5:
            yield rng.choice(["", " "]).join(rng.choices(WORDS, k=rng.randint(0, 8)))
        else:
            blocks = rng.choices(BLOCKS, k=rng.choice((1, 1, 3)))
            letters = (chr(rng.randint(*rng.choice(blocks))) for _ in range(rng.randint(1, 24)))
            yield "".join(letter if rng.random() > 0.15 else rng.choice(" e1") for letter in letters)


def exported(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer_files(tokenizer)["tokenizer.json"].decode())


@pytest.fixture(
    params=[
        {},
        {"byte_fallback": False},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<tool>", "the", "qu"]},
    ],
    ids=["llama", "no_bytes", "symbols"],
)
def sentencepiece(
    request: pytest.FixtureRequest, tmp_path: Path, sentencepiece_model: Callable[..., bytes]
) -> Tokenizer:
    options = {"model_type": "bpe", "remove_extra_whitespaces": False, **request.param}
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return load_tokenizer(tmp_path)


def test_sentencepiece_as_tokenizer_json(sentencepiece: Tokenizer) -> None:
    backend = exported(sentencepiece)
    texts = [text.encode(errors="ignore").decode() for text in strings(STRINGS, seed=1)]
    for special in (True, False):
        share = texts if special else texts[:2000]
        for text, encoding in zip(share, backend.encode_batch_fast(share, add_special_tokens=special), strict=True):
            assert encoding.ids == sentencepiece.encode(text, add_special_tokens=special), text


def test_its_text_is_ours(sentencepiece: Tokenizer) -> None:
    backend = exported(sentencepiece)
    unknown = backend.token_to_id("<unk>")  # the library writes a mark of its own for it, which no decoder can
    for text in strings(2000, seed=2):
        ids = sentencepiece.encode(text.encode(errors="ignore").decode(), add_special_tokens=False)
        ids = [index for index in ids if index != unknown]
        assert backend.decode(ids) == sentencepiece.decode(ids)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": ["<tool>"]},
    ],
    ids=str,
)
def test_what_would_differ_is_refused(
    options: dict[str, object], tmp_path: Path, sentencepiece_model: Callable[..., bytes]
) -> None:
    options = {"model_type": "bpe", "remove_extra_whitespaces": False, **options}
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    with pytest.raises(UnsupportedModelError, match=r"no exact tokenizer\.json"):
        tokenizer_files(load_tokenizer(tmp_path))


def test_the_default_models_files_are_read_by_transformers(default_model_path: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(default_model_path)
    for name, content in tokenizer_files(ours).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_ids[0])
    chat = [{"role": "user", "content": "Hi 🎉"}]
    assert ours.chat_template is not None
    rendered = ours.chat_template.render(chat, add_generation_prompt=True)
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == rendered
    for text in strings(500, seed=3):
        clean = text.encode(errors="ignore").decode()
        assert theirs(clean, add_special_tokens=False)["input_ids"] == ours.encode(clean, add_special_tokens=False)
